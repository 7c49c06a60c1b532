"""Session: the deadline of an answer."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from core.session import deadline
from core.settings import Settings
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import fake_service


def test_without_a_limit_there_is_no_deadline() -> None:
    """REQUEST_TIMEOUT_S is 0 and the platform has no deadline."""
    assert deadline(Settings(), None) is None


def test_request_timeout_s_counts_from_now() -> None:
    """The deadline is on the monotonic clock."""
    before = time.monotonic()
    ends = deadline(Settings(request_timeout_s=30), None)

    assert ends is not None
    assert before + 30 <= ends <= time.monotonic() + 30


@pytest.mark.parametrize(("timeout_s", "left_s", "expected_s"), [(30, 100, 30), (30, 20, 18), (0, 20, 18)])
def test_the_earlier_deadline_applies(timeout_s: float, left_s: float, expected_s: float) -> None:
    """It is REQUEST_TIMEOUT_S or DEADLINE_MARGIN_S before the platform's deadline."""
    now = time.monotonic()
    ends = deadline(Settings(request_timeout_s=timeout_s, deadline_margin_s=2), now + left_s)

    assert ends is not None
    assert now + expected_s <= ends <= now + expected_s + (time.monotonic() - now)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/extract", {"text": "Hi", "schema": {"type": "object"}}),
    ],
)
def test_the_deadline_reaches_the_engine(path: str, body: dict[str, object]) -> None:
    """Both generating routes pass it on. The engine's own tests check what happens then."""
    fake = fake_service(request_timeout_s=60)
    headers = {"content-type": "application/json", "host": "localhost"}
    before = time.monotonic()

    async def ask() -> int:
        request = Request("POST", path, "id", headers, body=json.dumps(body).encode(), client="127.0.0.1")
        response = await dispatch(fake.service, request)
        await response.aclose()
        return response.status

    assert asyncio.run(ask()) == 200
    [request] = fake.engine.requests
    assert request.deadline is not None
    assert before + 60 <= request.deadline <= time.monotonic() + 60
