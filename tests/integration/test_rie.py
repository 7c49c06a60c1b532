"""The image's entry point with the real model in Amazon's Runtime Interface Emulator, one request at a time."""

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
    """Run the entry point in the emulator. Without the emulator these tests fail; they are never skipped."""
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
    http_status, _, answer = from_buffered(json.loads(payload), payload)
    return http_status, answer


def chat(emulator: Emulator, **fields: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0, **fields}
    return call(emulator, "POST", "/v1/chat/completions", body)


def test_health_answers(emulator: Emulator) -> None:
    """The first event starts the process. The model may still be loading."""
    status, body = call(emulator, "GET", "/health")

    assert status == 200
    assert json.loads(body)["status"] in ("available", "ready")


def test_a_buffered_chat_is_answered(emulator: Emulator) -> None:
    """The model is real."""
    status, body = chat(emulator)
    completion = json.loads(body)

    assert status == 200
    assert completion["choices"][0]["message"]["content"].strip()
    assert completion["usage"]["completion_tokens"] > 0


def test_a_streamed_chat_is_buffered(emulator: Emulator) -> None:
    """A buffering front end returns all events at once."""
    status, body = chat(emulator, stream=True)

    assert status == 200
    assert body.count(b"data: ") > 2
    assert body.endswith(b"data: [DONE]\n\n")


def test_requests_after_errors_are_answered(emulator: Emulator) -> None:
    """The errors are wrong requests, an unknown event and invalid JSON."""
    assert call(emulator, "GET", "/models", key="wrong")[0] == 401
    assert chat(emulator, max_tokens=-1)[0] == 400
    assert chat(emulator)[0] == 200
    _, payload = emulator.invoke(b'{"Records":[{"eventSource":"aws:sqs"}]}')
    assert json.loads(payload)["errorType"] == "Function.UnknownEvent"
    _, payload = emulator.invoke(b"not json")
    assert json.loads(payload)["errorType"] == "Function.UnknownEvent"
    assert chat(emulator)[0] == 200
    assert call(emulator, "GET", "/health")[0] == 200


def test_a_direct_invoke_returns_plain_json(emulator: Emulator) -> None:
    """There is no HTTP envelope."""
    _, payload = emulator.invoke(json.dumps({"operation": "models"}).encode())

    assert json.loads(payload)["active"]["loaded"] is True


def test_the_log_is_json_with_the_cold_start_and_no_key(emulator: Emulator) -> None:
    """Every line is a JSON object, and one has the phases of the cold start."""
    call(emulator, "GET", "/health")
    lines = [json.loads(line) for line in emulator.printed().splitlines() if line.startswith("{")]

    starts = [line for line in lines if line["message"].startswith("Cold start")]
    assert len(starts) == 1
    assert {"wiring", "imports"} <= starts[0]["timeline"].keys()
    assert any(line.get("requestId") for line in lines)
    assert KEY not in emulator.printed()


def test_settings_that_leave_the_url_open_stop_the_start(tmp_path: Path) -> None:
    """Without keys and IAM the error names the missing variable."""
    fetch()
    with Emulator([sys.executable, "-m", "adapters.aws_lambda"], {"PYTHONPATH": str(ROOT)}) as emulator:
        status, payload = emulator.invoke(b"{}")

    assert status == 502
    assert json.loads(payload)["errorType"] == "Runtime.SettingsError"
    assert "API_KEYS" in json.loads(payload)["errorMessage"]
