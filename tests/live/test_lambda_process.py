"""Run the image's entry point with the real model against the Runtime API emulator."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.emulator.event import to_event
from infra.emulator.exchange import Exchange
from infra.emulator.runtime_api import RuntimeAPIServer

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


class Process:
    def __init__(self, server: RuntimeAPIServer, process: asyncio.subprocess.Process, log: Path) -> None:
        self.server = server
        self.process = process
        self.log = log

    def post(self, path: str, body: Any, *, timeout_s: float = 60.0) -> Exchange:
        headers = [("authorization", "Bearer secret"), ("content-type", "application/json")]
        event = to_event("POST", path, headers=headers, body=json.dumps(body).encode())
        return self.server.invoke(event, timeout_s=timeout_s)

    def chat(self, *, timeout_s: float = 60.0, **fields: Any) -> Exchange:
        body = {"messages": [{"role": "user", "content": "Count to ten."}], "temperature": 0, "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", body, timeout_s=timeout_s)

    async def finished(self, exchange: Exchange) -> Exchange:
        """Wait for the answer. Fail with the process's log if none comes."""
        answered = asyncio.ensure_future(exchange.finished.wait())
        ended = asyncio.ensure_future(self.process.wait())
        await asyncio.wait({answered, ended}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (answered, ended):
            task.cancel()
        assert exchange.finished.is_set(), self.log.read_text()
        return exchange

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@asynccontextmanager
async def running(folder: Path, *, concurrency: int = 1, **environ: str) -> AsyncIterator[Process]:
    """Start the entry point and check that it follows the Runtime API's contract."""
    log = folder / "log"
    async with RuntimeAPIServer(concurrency=concurrency) as server:
        process_environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "MODELS_DIR": str(folder / "models"),
            "API_KEYS": "secret",
            "N_CTX": "1024",
            "N_THREADS": "1",
            "AWS_LAMBDA_RUNTIME_API": server.address,
            **environ,
        }
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "adapters.aws_lambda", env=process_environ, stdout=file, stderr=file, cwd=folder
            )
            try:
                yield Process(server, process, log)
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                    await process.wait()
        assert server.violations == []


def deltas(exchange: Exchange) -> list[dict[str, Any]]:
    """Return the chunks of a streamed chat without [DONE] and comments."""
    frames = bytes(exchange.body).decode().split("\n\n")
    return [json.loads(frame[6:]) for frame in frames if frame.startswith("data: {")]


def test_a_streamed_chat_has_a_chunk_per_token(tmp_path: Path) -> None:
    """Each token is sent on its own, as whole SSE events. The cold start is one log line."""

    async def go() -> None:
        async with running(tmp_path) as process:
            exchange = await process.finished(process.chat(stream=True))
            frames = [frame for frame in bytes(exchange.body).split(b"\n\n") if frame]
            assert frames[-1] == b"data: [DONE]"
            assert len(exchange.chunks) >= 8  # one per token: no token waits for the next
            assert all(chunk.endswith((b"\n\n", b"\0" * 8)) for _, chunk in exchange.chunks)
            starts = [line for line in process.lines() if line["message"].startswith("Cold start")]
            assert len(starts) == 1
            assert starts[0]["timeline"]["load"]["duration_ms"] > 0

    asyncio.run(go())


def test_a_load_survives_freezing(tmp_path: Path) -> None:
    """A process that is frozen while its model loads continues when it is thawed."""

    async def go() -> None:
        async with running(tmp_path) as process:
            while b'"imports"' not in process.log.read_bytes() and not process.server.polled.is_set():
                process.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.1)
                assert process.process.returncode is None
                process.process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.1)
            exchange = await process.finished(process.chat())
            assert exchange.status == 200
            assert json.loads(exchange.body)["choices"][0]["message"]["content"]

    asyncio.run(go())


def test_generation_ends_before_the_deadline(tmp_path: Path) -> None:
    """An answer that would outlast the function ends early and is complete: finish_reason, usage and [DONE].

    On a busy machine the first token may come too late, which is an error event. The test then allows more time.
    """

    async def go() -> None:
        async with running(tmp_path) as process:
            await process.finished(process.chat())
            for timeout_s in (3.5, 8, 32):
                exchange = process.chat(
                    stream=True,
                    max_tokens=1000,
                    logit_bias={"2": -100},
                    stream_options={"include_usage": True},
                    timeout_s=timeout_s,
                )
                await process.finished(exchange)
                if b'"code":"timeout"' not in exchange.body:
                    break
            chunks = deltas(exchange)
            assert exchange.trailers == {}
            assert chunks[-2]["choices"][0]["finish_reason"] == "length"
            assert 0 < chunks[-1]["usage"]["completion_tokens"] < 1000
            assert bytes(exchange.body).endswith(b"data: [DONE]\n\n")
            assert time.monotonic() < exchange.deadline

    asyncio.run(go())


def test_snapstart_works_with_the_real_model(tmp_path: Path) -> None:
    """The model decodes before the snapshot. The restored process renews its keys and answers."""

    async def go() -> None:
        async with running(tmp_path, AWS_LAMBDA_INITIALIZATION_TYPE="snap-start") as process:
            await asyncio.wait_for(process.server.snapshot.wait(), PATIENCE_S)
            assert not process.server.polled.is_set()
            assert any(line["message"].startswith("Cold start: ready") for line in process.lines())
            process.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            process.process.send_signal(signal.SIGCONT)
            process.server.restored.set()
            first = await process.finished(process.chat(temperature=1))
            assert first.status == 200
            restored = [line for line in process.lines() if line["message"].startswith("Cold start")][-1]
            assert restored["timeline"].keys() == {"restore"}  # the start belongs to the snapshot
            health = await process.finished(process.server.invoke({"operation": "health"}))
            assert json.loads(health.body)["engine"]["requests"] == 3  # the primed chat and extraction, and this chat

    asyncio.run(go())


@pytest.mark.parametrize("count", [2])
def test_streams_run_concurrently_in_one_process(tmp_path: Path, count: int) -> None:
    """With AWS_LAMBDA_MAX_CONCURRENCY one model serves several events at a time."""

    async def go() -> None:
        environ = {"AWS_LAMBDA_MAX_CONCURRENCY": str(count)}
        async with running(tmp_path, concurrency=count, **environ) as process:
            exchanges = [process.chat(stream=True, max_tokens=24, logit_bias={"2": -100}) for _ in range(count)]
            for exchange in exchanges:
                await process.finished(exchange)
                assert exchange.status == 200
            first, second = ([moment for moment, _ in exchange.chunks] for exchange in exchanges)
            assert first[0] < second[-1]
            assert second[0] < first[-1]

    asyncio.run(go())
