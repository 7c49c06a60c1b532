"""Limit the number of our files that one streamed chat crosses, on a local server and on Lambda.

A file counts if a Python function that is written in it starts between the first byte of the request and the last byte
of the stream, in any thread. `sys.setprofile` reports the starts. Reading an attribute, and the methods that
`dataclass` and msgspec generate, do not count. An earlier request has loaded the model, imported the handlers and
compiled the template, and the threads of the load have ended: the count is that of an ordinary request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2 as httpx

from adapters.serving.asgi import Endpoint
from adapters.wiring import build
from core.service import Service
from core.settings import Settings
from infra.emulator.event import to_event
from tests.lambda_runtime import runtime
from tests.serving import serving

ROOT = Path(__file__).parents[2]
MOST_FILES = 31  # a new file should replace another
MOST_FILES_ON_LAMBDA = 36
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}


class Crossed:
    """The files of core, handlers and adapters in which a function started while `recording` was set."""

    def __init__(self) -> None:
        self.recording = threading.Event()
        self._files: set[str] = set()

    @property
    def files(self) -> list[str]:
        return sorted(path for path in self._files if path.startswith(("core/", "handlers/", "adapters/")))

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and self.recording.is_set():
            path = frame.f_code.co_filename
            if path.startswith(f"{ROOT}/"):
                self._files.add(path.removeprefix(f"{ROOT}/"))


@contextmanager
def profiled() -> Iterator[Crossed]:
    """Profile this thread and the threads that start inside the block."""
    crossed = Crossed()
    threading.setprofile(crossed.profile)
    sys.setprofile(crossed.profile)
    try:
        yield crossed
    finally:
        threading.setprofile(None)
        sys.setprofile(None)


def wait_loaded() -> None:
    """Wait for the threads that a load leaves running after the model is served."""
    for thread in threading.enumerate():
        if thread.name in ("load", "prepare"):
            thread.join(30)
            assert not thread.is_alive()


def tiny_service(tiny: Callable[[str], Path], folder: Path) -> Service:
    return build(Settings(models_dir=folder, model_path=str(tiny("llama")), n_ctx=512, allowed_hosts=("*",)))


def test_a_streamed_chat_crosses_few_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The server, its worker threads and the engine thread are real, with a tiny model."""
    service = tiny_service(tiny, tmp_path)
    with (
        profiled() as crossed,
        serving(service) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        assert client.get("/health?wait=60").json()["status"] == "ready"
        for recording in (False, True):
            if recording:
                wait_loaded()
                crossed.recording.set()
            answer = client.post("/v1/chat/completions", json=CHAT)
            crossed.recording.clear()
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")

    assert {"adapters/serving/server.py", "handlers/sse.py", "core/chat.py", "core/engine/worker.py"} <= set(
        crossed.files
    )
    assert len(crossed.files) <= MOST_FILES, "\n".join(crossed.files)


def test_a_streamed_chat_on_lambda_crosses_few_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The runtime loop is real and reads a function URL's event from a double of the Runtime API."""
    event = to_event(
        "POST",
        "/v1/chat/completions",
        headers=[("content-type", "application/json")],
        body=json.dumps(CHAT).encode(),
    )

    async def chat_twice(crossed: Crossed) -> None:
        endpoint = Endpoint(tiny_service(tiny, tmp_path))
        endpoint.start()
        try:
            async with runtime(endpoint) as bench:
                for recording in (False, True):
                    if recording:
                        await asyncio.to_thread(wait_loaded)
                        crossed.recording.set()
                    exchange = await bench.invoke(event, timeout_s=60)
                    crossed.recording.clear()
                    assert exchange.status == 200
                    assert bytes(exchange.body).endswith(b"data: [DONE]\n\n")
        finally:
            await endpoint.close()

    with profiled() as crossed:
        asyncio.run(chat_twice(crossed))

    assert {"adapters/aws_lambda/runtime.py", "handlers/sse.py", "core/engine/worker.py"} <= set(crossed.files)
    assert len(crossed.files) <= MOST_FILES_ON_LAMBDA, "\n".join(crossed.files)
