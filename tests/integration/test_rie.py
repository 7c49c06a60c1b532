"""The image's entry point and the real model under Amazon's Runtime Interface Emulator. One request at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.emulator.event import from_buffered, to_event
from infra.emulator.rie import Emulator, fetch

ROOT = Path(__file__).parents[2]
KEY = "test-key"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Without the emulator these tests fail; they are never skipped."""
    try:
        fetch()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    home = tmp_path_factory.mktemp("home")
    environ = {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "MODELS_DIR": str(home / "models"),
        "API_KEYS": KEY,
        "ADMIN_API_KEYS": "admin",
        "RESPONSE_MODE": os.environ.get("RESPONSE_MODE", "buffered"),  # the emulator cannot stream
        "N_CTX": "512",
    }
    with Emulator([sys.executable, "-m", "adapters.aws_lambda"], environ) as running:
        yield running


def call(emulator: Emulator, method: str, path: str, body: Any = None, *, key: str = KEY) -> tuple[int, Any]:
    headers = [("authorization", f"Bearer {key}"), ("content-type", "application/json")]
    content = b"" if body is None else json.dumps(body).encode()
    event = to_event(method, path, headers=headers, body=content)
    status, payload = emulator.invoke(json.dumps(event).encode())
    assert status == 200, emulator.printed()
    told, _, answer = from_buffered(json.loads(payload), payload)
    return told, answer


def chat(emulator: Emulator, **fields: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0, **fields}
    return call(emulator, "POST", "/v1/chat/completions", body)


def test_health(emulator: Emulator) -> None:
    """The first event starts the process; health answers while the model loads or is ready."""
    status, body = call(emulator, "GET", "/health")

    assert status == 200
    assert json.loads(body)["status"] in ("available", "ready")


def test_chat(emulator: Emulator) -> None:
    """A buffered chat with the real model."""
    status, body = chat(emulator)
    completion = json.loads(body)

    assert status == 200
    assert completion["choices"][0]["message"]["content"].strip()
    assert completion["usage"]["completion_tokens"] > 0


def test_streamed_chat_is_buffered_whole(emulator: Emulator) -> None:
    """`stream: true` under a buffering front end is the same events, at once."""
    status, body = chat(emulator, stream=True)

    assert status == 200
    assert body.count(b"data: ") > 2
    assert body.endswith(b"data: [DONE]\n\n")


def test_errors_and_recovery(emulator: Emulator) -> None:
    """A client's error, an unknown event and an unreadable one are each followed by good answers."""
    assert call(emulator, "GET", "/models", key="wrong")[0] == 401
    assert chat(emulator, max_tokens=-1)[0] == 400
    assert chat(emulator)[0] == 200
    _, payload = emulator.invoke(b'{"Records":[{"eventSource":"aws:sqs"}]}')
    assert json.loads(payload)["errorType"] == "Function.UnknownEvent"
    _, payload = emulator.invoke(b"not json")
    assert json.loads(payload)["errorType"] == "Function.UnknownEvent"
    assert chat(emulator)[0] == 200
    assert call(emulator, "GET", "/health")[0] == 200


def test_direct_invoke(emulator: Emulator) -> None:
    """An operation answers with its plain JSON body."""
    _, payload = emulator.invoke(json.dumps({"operation": "models"}).encode())

    assert json.loads(payload)["active"]["loaded"] is True


def test_the_log_is_json_with_the_cold_start_and_no_key(emulator: Emulator) -> None:
    """Every line of the runtime is an object; one tells the cold start's phases; no key is in any."""
    call(emulator, "GET", "/health")
    lines = [json.loads(line) for line in emulator.printed().splitlines() if line.startswith("{")]

    starts = [line for line in lines if line["message"].startswith("Cold start")]
    assert len(starts) == 1
    assert {"wiring", "imports"} <= starts[0]["timeline"].keys()
    assert any(line.get("requestId") for line in lines)
    assert KEY not in emulator.printed()


def test_settings_that_leave_the_url_open_stop_the_start(tmp_path: Path) -> None:
    """Without keys and without IAM the start fails, and says which variable is missing."""
    fetch()
    with Emulator([sys.executable, "-m", "adapters.aws_lambda"], {"PYTHONPATH": str(ROOT)}) as emulator:
        status, payload = emulator.invoke(b"{}")

    assert status == 502
    assert json.loads(payload)["errorType"] == "Runtime.SettingsError"
    assert "API_KEYS" in json.loads(payload)["errorMessage"]
