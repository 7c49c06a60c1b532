"""Read request bodies: each within MAX_BODY_BYTES, and all of those in memory at once within a shared budget."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from core.errors import Busy, TooLarge
from handlers.http import Request

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

BUDGET_FACTOR = 8  # the bodies of all running requests may have this many times MAX_BODY_BYTES
UNCOUNTED_BYTES = (
    64 << 10
)  # of each body; uvicorn buffers this much anyway, and an ordinary chat must never wait for room
WAIT_S, RETRY_S = 2.0, 5  # how long a body waits for room, and the Retry-After of a refused one
DRAIN_FACTOR, DRAIN_S = 4, 5.0  # a refused body is read up to this multiple of the limit, for this many seconds


class Gone(Exception):
    """The client disconnected."""


class Budget:
    """The bytes that the bodies of all running requests may have in memory. Belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        """Size the budget for bodies of up to `limit` bytes each."""
        self.size = limit * BUDGET_FACTOR
        self.used = 0
        self._released = asyncio.Event()

    def reservation(self) -> Reservation:
        """Return an empty reservation for one request."""
        return Reservation(self)

    async def take(self, count: int) -> None:
        """Reserve `count` bytes. Raise Busy if they are not free within WAIT_S."""
        try:
            async with asyncio.timeout(WAIT_S):
                while self.used + count > self.size:
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            raise Busy(
                f"The bodies of running requests may have {self.size} bytes together ({BUDGET_FACTOR} times "
                f"MAX_BODY_BYTES), and {count} more do not fit now. Try again later, or send less than "
                f"{UNCOUNTED_BYTES} bytes.",
                retry_after=RETRY_S,
            ) from None
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count
        self._released.set()


class Reservation:
    """The part of the budget that the body of one request takes."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._taken = 0

    async def reserve(self, size: int) -> None:
        """Reserve enough for a body of `size` bytes. Raise Busy if there is no room."""
        missing = size - UNCOUNTED_BYTES - self._taken
        if missing > 0:
            await self._budget.take(missing)
            self._taken += missing

    def release(self) -> None:
        self._budget.give_back(self._taken)
        self._taken = 0


async def read(request: Request, receive: Receive, limit: int, reservation: Reservation) -> Request:
    """Return `request` with its body.

    Raise TooLarge or Busy as early as possible, before the body is read if its length is declared, or Gone after a
    disconnect.
    """
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    unread = "expect" not in request.headers  # with `Expect: 100-continue` no body was sent yet; do not invite it
    chunks: list[bytes] = []
    size = 0
    try:
        # 1) Check the declared length.
        if length > limit:
            raise TooLarge(f"The request body has {declared[:20]} bytes. The maximum is {limit} (MAX_BODY_BYTES).")
        await reservation.reserve(length)
        # 2) Read, also what was not declared.
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            chunk, unread = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"The request body has more than the maximum of {limit} bytes (MAX_BODY_BYTES).")
            await reservation.reserve(size)
            chunks.append(chunk)
            if not unread:
                break
    except (TooLarge, Busy):
        if unread:
            chunks.clear()
            reservation.release()
            await _drain(receive, limit)
        raise
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return dataclasses.replace(request, body=body)


async def _drain(receive: Receive, limit: int) -> None:
    """Read and discard the rest of a body. A socket that is closed with unread bytes sends a reset, and the client
    would not see the refusal."""
    size = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while size <= limit * DRAIN_FACTOR:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
