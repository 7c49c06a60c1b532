"""Read and write HTTP/1.1 for the Runtime API emulator: strictly, and in segments of any size."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

_REASON = {200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 410: "Gone", 413: "Too Large"}


class Malformed(ConnectionError):
    """The bytes are not HTTP/1.1. Nothing after them can be read."""


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """Return the next chunk, b"" for the last one. Raises Malformed."""
    line = await reader.readuntil(b"\r\n")
    try:
        size = int(line[:-2], 16)
    except ValueError:
        raise Malformed(f"{line[:40]!r} is not the size of a chunk") from None
    if size == 0:
        return b""
    data = await reader.readexactly(size + 2)
    if data[-2:] != b"\r\n":
        raise Malformed("a chunk does not end with CR LF")
    return data[:-2]


async def read_trailers(reader: asyncio.StreamReader) -> dict[str, str]:
    """Return the trailers by lower-case name."""
    trailers: dict[str, str] = {}
    while (line := (await reader.readuntil(b"\r\n"))[:-2].decode("latin-1")) != "":
        name, _, value = line.partition(":")
        trailers[name.lower()] = value.strip()
    return trailers


async def discard(headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
    """Read a body and drop it."""
    if "content-length" in headers:
        await reader.readexactly(int(headers["content-length"]))
        return
    while await read_chunk(reader):
        pass
    await read_trailers(reader)


async def reply(
    writer: asyncio.StreamWriter, status: int, body: bytes, *, close: bool = False, segment: int = 0
) -> bool:
    """Send a reply and return whether the connection stays open."""
    head = f"HTTP/1.1 {status} {_REASON.get(status, 'Status')}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n" + ("Connection: close\r\n" if close else "") + "\r\n"
    await write(writer, head.encode() + body, segment)
    return not close


async def write(writer: asyncio.StreamWriter, data: bytes, segment: int = 0) -> None:
    """Write at once, or in segments of `segment` bytes."""
    if not segment:
        writer.write(data)
    for start in range(0, len(data) if segment else 0, segment or 1):
        writer.write(data[start : start + segment])
        await asyncio.sleep(0)
    await writer.drain()
