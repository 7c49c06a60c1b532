"""Measure what half-open requests cost the local server and another client.

The benchmark opens many connections that never complete a head, or send a body byte by byte. It measures when the last
one is closed, the memory they use, and the latency of `GET /health` during the attack.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

KEY = "wire-benchmark"
ROOT = Path(__file__).parents[2]
START_S = 60.0

HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-drip: "
BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"x-api-key: " + KEY.encode() + b"\r\ncontent-length: 1000000\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Attack:
    """The result. `closed_s` and `statuses` have one entry for each connection that the server closed."""

    closed_s: tuple[float, ...]
    statuses: tuple[bytes, ...]
    healthy_s: tuple[float, ...]

    def p99(self) -> float:
        return statistics.quantiles(self.healthy_s, n=100)[98]


async def attack(address: str, heads: int, bodies: int, *, drip_s: float = 1.0, limit_s: float = 60.0) -> Attack:
    """Open incomplete requests that send a byte every `drip_s` until the server closes them, for at most `limit_s`.

    A healthy client sends requests at the same time, alternately over a reused and over a new connection.
    """
    url = urlsplit(address)
    assert url.hostname
    assert url.port
    place = (url.hostname, url.port)
    over = asyncio.Event()
    healthy = asyncio.create_task(_healthy(place, over))
    openings = [HEAD] * heads + [BODY] * bodies
    ends = await asyncio.gather(*(_half_open(place, opening, drip_s, limit_s) for opening in openings))
    over.set()
    closed = [end for end in ends if end is not None]
    return Attack(tuple(at for at, _ in closed), tuple(status for _, status in closed), tuple(await healthy))


async def _half_open(
    place: tuple[str, int], opening: bytes, drip_s: float, limit_s: float
) -> tuple[float, bytes] | None:
    """Return when the server closed the connection, and its status line. None if it did not."""
    reader, writer = await asyncio.open_connection(*place)
    began = time.monotonic()
    writer.write(opening)
    drip = asyncio.create_task(_drip(writer, drip_s))
    try:
        async with asyncio.timeout(limit_s):
            answer = await reader.read()
        return time.monotonic() - began, answer.partition(b"\r\n")[0]
    except ConnectionError:
        return time.monotonic() - began, b""
    except TimeoutError:
        return None
    finally:
        drip.cancel()
        writer.close()


async def _drip(writer: asyncio.StreamWriter, drip_s: float) -> None:
    while True:
        await asyncio.sleep(drip_s)
        writer.write(b"a")


async def _healthy(place: tuple[str, int], over: asyncio.Event) -> list[float]:
    taken: list[float] = []
    reused: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    while not over.is_set():
        began = time.monotonic()
        connection = reused or await asyncio.open_connection(*place)
        reader, writer = connection
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise ConnectionError(f"The healthy client was refused: {head!r}")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        taken.append(time.monotonic() - began)
        if reused is None:
            reused = connection
        else:
            writer.close()
            reused = None
        await asyncio.sleep(0.01)
    if reused is not None:
        reused[1].close()
    return taken


def _resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def measure(heads: int, bodies: int) -> int:
    """Start a server, attack it and print the results. Return 1 if a target is not met."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        environ = {**os.environ, "API_KEYS": KEY, "EMBEDDED_MODEL": "off", "MODELS_DIR": folder, "LOG_LEVEL": "error"}
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "adapters.local", "--host", "127.0.0.1", "--port", "0"),
            cwd=ROOT,
            env=environ,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert server.stdout is not None
            first = (await asyncio.wait_for(server.stdout.readline(), START_S)).decode()
            address = first.split()[-1]
            await attack(address, 1, 0, limit_s=0.5)
            before = _resident(server.pid)
            peak = asyncio.create_task(_peak(server.pid))
            result = await attack(address, heads, bodies)
            peak.cancel()
            grown = max(await peak) - before
        finally:
            server.terminate()
            await server.wait()
    count = heads + bodies
    print(f"closed: {len(result.closed_s)} of {count}, the last after {max(result.closed_s):.1f} s (target: 15 s)")
    print(f"memory: {grown:+.1f} MiB from {before:.0f} (target: at most 50)")
    print(
        f"healthy client: {len(result.healthy_s)} requests, median {statistics.median(result.healthy_s) * 1e3:.1f} ms, "
        f"p99 {result.p99() * 1e3:.1f} ms, longest {max(result.healthy_s) * 1e3:.1f} ms (target: p99 below 200)"
    )
    return int(len(result.closed_s) < count or max(result.closed_s) > 15 or grown > 50 or result.p99() > 0.2)


async def _peak(pid: int) -> list[float]:
    seen = [_resident(pid)]
    try:
        while True:
            await asyncio.sleep(0.2)
            seen.append(_resident(pid))
    except asyncio.CancelledError:
        return seen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench.wire", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=500, help="half-open heads (default: %(default)s)")
    parser.add_argument("--bodies", type=int, default=500, help="dripping bodies (default: %(default)s)")
    options = parser.parse_args(argv)
    return asyncio.run(measure(options.heads, options.bodies))


if __name__ == "__main__":
    sys.exit(main())
