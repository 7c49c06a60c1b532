"""The server, as a process, refuses models that cannot generate and continues to serve."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.integration.test_local_process import process

ADMIN = {"x-api-key": "admin"}
REFUSED = ("bert", "t5", "llada")


def _chat(address: str) -> httpx.Response:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers=ADMIN, timeout=60)


def test_a_reload_of_such_a_model_keeps_the_served_one(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for kind in ("llama", *REFUSED):
        shutil.copy(tiny(kind), models)
    with process(tmp_path, MODEL_PATH="llama.gguf", N_THREADS="1", ADMIN_API_KEYS="admin") as (running, address, _):
        before = _chat(address)
        assert before.status_code == 200, before.text
        for kind in REFUSED:
            answer = httpx.post(f"{address}/reload", json={"model_path": f"{kind}.gguf"}, headers=ADMIN, timeout=60)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_path"), answer.text
            assert "only models that generate text can be served" in answer.json()["error"]["message"]
        after = _chat(address)
        assert after.status_code == 200, after.text
        assert after.json()["model"] == "llama"
        assert after.json()["choices"] == before.json()["choices"]
        assert running.poll() is None


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_start_with_such_a_model_reports_it(kind: str, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """The process does not exit. /health and every request have the error."""
    environ = {"MODEL_PATH": str(tiny(kind)), "AUTO_PRELOAD": "true", "ADMIN_API_KEYS": "admin"}
    with process(tmp_path, **environ) as (running, address, _):
        health = httpx.get(f"{address}/health", params={"wait": 20}, headers=ADMIN, timeout=60).json()
        assert health["status"] != "ready"
        assert "only models that generate text can be served" in str(health)
        answer = _chat(address)
        assert answer.status_code == 503
        assert "only models that generate text" in answer.json()["error"]["message"]
        assert running.poll() is None
