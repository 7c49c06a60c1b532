"""How many of our files one streamed chat crosses on a local server: a bound on what a reader has to follow."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2 as httpx

from adapters.wiring import build
from core.settings import Settings
from tests.serving import serving

ROOT = Path(__file__).parents[2]
MOST_FILES = 31  # 39 before modules were merged; a new one should replace another


@contextmanager
def profiled(files: set[str], recording: threading.Event) -> Iterator[None]:
    """While `recording` is set, add the file of each Python function of ours that starts, in threads started here."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and recording.is_set():
            path = frame.f_code.co_filename
            if path.startswith(f"{ROOT}/"):
                files.add(path.removeprefix(f"{ROOT}/"))

    threading.setprofile(profile)
    try:
        yield
    finally:
        threading.setprofile(None)
        sys.setprofile(None)


def test_a_streamed_chat_crosses_few_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Count the files in which a function runs between the first byte of a request and the last of its stream.

    The server, its worker threads and the engine thread are real, with a tiny model. An earlier request has loaded the
    model and compiled its template, so that the count is that of an ordinary request.
    """
    files: set[str] = set()
    recording = threading.Event()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    service = build(Settings(models_dir=tmp_path, model_path=str(tiny("control")), n_ctx=512))
    with profiled(files, recording), serving(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health?wait=60").json()["status"] == "ready"
        for warm in (True, False):
            if not warm:
                recording.set()
            answer = client.post("/v1/chat/completions", json=body)
            recording.clear()
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")

    crossed = sorted(path for path in files if path.startswith(("core/", "handlers/", "adapters/")))
    assert {"adapters/serving/asgi.py", "handlers/sse.py", "core/chat.py", "core/engine/worker.py"} <= set(crossed)
    assert len(crossed) <= MOST_FILES, "\n".join(crossed)
