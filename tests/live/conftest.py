"""Run the real server on the embedded model, as a process and inside this one."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from openai import OpenAI

from adapters.wiring import build
from core.service import Service
from core.settings import Settings

ROOT = Path(__file__).parents[2]
READY_S = 180  # the machine may be busy; no test measures time


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start `python -m adapters.local` without configuration, wait for its model and yield its address."""
    folder = tmp_path_factory.mktemp("server")
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    environ |= {
        "PYTHONPATH": str(ROOT),
        "MODELS_DIR": str(folder / "models"),
        "LOG_FORMAT": "text",
        "LOCAL_ADMIN": "true",
        "RESPONSES_STORE": "1MB",
        "N_THREADS": "1",  # threads spin at barriers: two test processes with one for each CPU stall each other
    }
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "adapters.local", "--port", "0"],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        match = re.search(r"http://\S+", first)
        assert match is not None, first + (folder / "log").read_text()
        state = httpx.get(f"{match[0]}/health", params={"wait": READY_S}, timeout=READY_S + 10).json()
        assert state["status"] == "ready", state
        yield match[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)
        log.close()
    assert process.returncode == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[OpenAI]:
    """Yield OpenAI's own client, without retries."""
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=READY_S) as openai:
        yield openai


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """Share one event loop among all tests in this process."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def service(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Wire the service as in production, inside this process, and wait for its model."""
    service = build(Settings(models_dir=tmp_path_factory.mktemp("models"), n_ctx=2048, n_threads=1))
    state = runner.run(service.host.wait_ready(READY_S))
    assert state.status == "ready", state
    yield service
    runner.run(service.host.close(5))
