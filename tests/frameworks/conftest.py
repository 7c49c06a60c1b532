"""Run the server in its own environment. The frameworks reach it over HTTP and import nothing of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from weather import Calls

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
        "N_THREADS": "1",
    }
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [ROOT / ".venv/bin/python", "-u", "-m", "adapters.local", "--port", "0"],
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
        with urllib.request.urlopen(f"{match[0]}/health?wait={READY_S}", timeout=READY_S + 10) as answer:
            state = json.load(answer)
        assert state["status"] == "ready", state
        yield match[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)
        log.close()
    assert process.returncode == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def url(server: str) -> str:
    """Return the base URL of an OpenAI client."""
    return f"{server}/v1"


@pytest.fixture
def calls() -> Calls:
    """Return the record of the tool's calls, with the tool."""
    return Calls()
