"""Receive blocks over one connection of a download."""

from __future__ import annotations

import time
from typing import Protocol

from adapters.transfer.connection import Connection, ConnectionBroken
from adapters.transfer.errors import MAX_ERROR_BODY, error_of

# Bytes per read. When a connection breaks, the bytes of the interrupted read are lost.
FIRST_READ, LEAST_READ, LARGEST_READ = 16 << 10, 4 << 10, 1 << 20


class Origin(Protocol):
    """Where an object's bytes are. Thread-safe."""

    name: str  # for messages
    etag: str | None  # of the version that is read; None: responses carry no useful ETag

    def request(self, first: int, last: int, *, renew: bool = False) -> tuple[str, dict[str, str]]:
        """Return URL and headers of a GET for bytes `first` to `last` (inclusive), signed now, pinned to one version.

        With `renew` the last request was refused: fetch new credentials or a new address first.
        """
        ...


class Lane:
    """One connection and the block it is receiving. One thread uses it.

    `buffer` holds the first `filled` bytes of the block, so that they survive a broken connection.
    """

    def __init__(self, connection: Connection, block_bytes: int) -> None:
        self.connection = connection
        self.buffer = memoryview(bytearray(block_bytes))
        self.filled = 0
        self.began = 0.0  # when the block was first requested
        self._read_bytes = FIRST_READ

    def ask(self, origin: Origin, first: int, last: int, size: int, *, renew: bool) -> None:
        """Request bytes `first` to `last`. Raise ConnectionBroken, Refused or ModelUnavailable if others come."""
        url, headers = origin.request(first, last, renew=renew)
        response = self.connection.send("GET", url, headers)
        length = last + 1 - first
        whole = response.status == 200 and response.length == size == length
        if response.status != 206 and not whole:
            body = self.connection.read(MAX_ERROR_BODY) if response.status >= 300 else b""
            raise error_of(response.status, body, origin.name)
        if origin.etag is not None and response.getheader("ETag", origin.etag) != origin.etag:
            raise error_of(412, b"", origin.name)  # the server ignores If-Match
        expected = f"bytes {first}-{last}/{size}"
        if not whole and (response.getheader("Content-Range") != expected or response.length != length):
            raise ConnectionBroken(f"requested {expected}, received {response.getheader('Content-Range')}")

    def receive(self, block: memoryview) -> None:
        """Fill `block`, a slice of `buffer`, from `filled` on. Raise ConnectionBroken if the bytes do not come.

        Reads are sized to take about a tenth of a second, so that a break costs little on a slow link.
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
