"""Lane: one connection of a download, and the block that it is receiving."""

from __future__ import annotations

import time
from typing import Protocol

from adapters.transfer.connection import Connection, ConnectionBroken
from adapters.transfer.errors import error_of

# Bytes that one read asks for. A break loses those of the read that it interrupts.
FIRST_READ, LEAST_READ, LARGEST_READ = 16 << 10, 4 << 10, 1 << 20


class Origin(Protocol):
    """Where an object's bytes are. Thread-safe."""

    name: str  # for messages
    etag: str | None  # of the version; None: the origin names none for ranges

    def request(self, first: int, last: int, *, renew: bool = False) -> tuple[str, dict[str, str]]:
        """URL and headers of a GET for bytes `first` to `last` (both counted), signed now and pinned to one version.

        `renew`: the last one was refused, so fetch new credentials or a new address first.
        """
        ...


class Lane:
    """One thread uses it. The first `filled` bytes of its block are in its buffer: a break does not lose them."""

    def __init__(self, connection: Connection, block_bytes: int) -> None:
        self.connection = connection
        self.buffer = memoryview(bytearray(block_bytes))
        self.filled = 0
        self.began = 0.0  # when the block was first asked for
        self._read_bytes = FIRST_READ

    def ask(self, origin: Origin, first: int, last: int, size: int, *, renew: bool) -> None:
        """Request bytes `first` to `last`. Raise ConnectionBroken, Refused or ModelUnavailable if others come."""
        url, headers = origin.request(first, last, renew=renew)
        response = self.connection.send("GET", url, headers)
        length = last + 1 - first
        whole = response.status == 200 and response.length == size == length
        if response.status != 206 and not whole:
            body = self.connection.read(65536) if response.status >= 300 else b""
            raise error_of(response.status, body, origin.name)
        if origin.etag is not None and response.getheader("ETag", origin.etag) != origin.etag:
            raise error_of(412, b"", origin.name)  # from a server that ignores If-Match
        ranged = f"bytes {first}-{last}/{size}"
        if not whole and (response.getheader("Content-Range") != ranged or response.length != length):
            raise ConnectionBroken(f"asked for {ranged}, got {response.getheader('Content-Range')}")

    def receive(self, block: memoryview) -> None:
        """Fill `block`, a part of `buffer`, from `filled` on. Raises ConnectionBroken.

        A read takes about a tenth of a second, so that on a slow link a break costs little.
        """
        while self.filled < len(block):
            began = time.monotonic()
            view = block[self.filled : self.filled + self._read_bytes]
            self.connection.read_into(view)
            self.filled += len(view)
            took = time.monotonic() - began
            if took < 0.02:
                self._read_bytes = min(LARGEST_READ, 2 * self._read_bytes)
            elif took > 0.2:
                self._read_bytes = max(LEAST_READ, self._read_bytes // 2)
        self.filled = 0
