"""One event and its answer, and the faults that the Runtime API emulator injects into it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The faults of one invocation."""

    next_status: int = 200  # of /next, instead of the event
    segment: int = 0  # bytes in each TCP segment of /next's reply; 0: all at once
    close_after_next: bool = False  # the connection of /next is closed, unannounced
    reject_after: int | None = None  # bytes of the answer, then 413 and Connection: close
    hang_up_after: int | None = None  # chunks of the answer, then the connection is cut
    status: int = 202  # of /response
    silent: bool = False  # there is no reply to /response
    delay_s: float = 0.0  # before the reply to /response
    split_reply: bool = False  # that reply byte by byte
    close_after_reply: bool = False  # the connection of /response is closed, unannounced
    pause_s: float = 0.0  # before each chunk is read


@dataclass(eq=False)
class Exchange:
    """One event and its answer. `kind` is None until the answer begins."""

    id: str
    event: bytes
    headers: Mapping[str, str]
    deadline: float  # on time.monotonic()'s clock
    behaviour: Behaviour
    keep: bool  # the bytes, in `body` and `chunks`; else they are only in `data`
    invocation_id: str
    kind: Literal["stream", "buffered", "error"] | None = None
    prelude: dict[str, Any] | None = None
    body: bytearray = field(default_factory=bytearray)  # without the prelude
    chunks: list[tuple[float, bytes]] = field(default_factory=list)  # (arrival time, bytes)
    trailers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    handed_out: float | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # kind is known, and the prelude of a stream
    data: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(16))  # body bytes; None: the end
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> int:
        record = self.prelude if self.kind == "stream" else json.loads(self.body)
        assert record is not None
        return int(record["statusCode"])

    def fail(self, kind: str, message: str) -> None:
        """End the exchange without the runtime: its process has exited, or its time is up."""
        if not self.finished.is_set():
            self.error = {"errorType": kind, "errorMessage": message}
            if self.kind is None:
                self.kind = "error"
            self.begun.set()
            self.finished.set()
            while self.data.full():
                self.data.get_nowait()
            self.data.put_nowait(None)
