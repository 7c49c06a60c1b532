"""How the runtime starts and ends: the ten seconds of init, SnapStart and SIGTERM."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from adapters.aws_lambda import snapstart
from adapters.aws_lambda.runtime import INIT_S, init_seconds
from infra.emulator.event import to_event
from tests.lambda_runtime import PATIENCE_S, json_app, runtime


class Application:
    """An application that records the paths that it serves and its close."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append(scope["path"])
        await json_app()(scope, receive, send)

    async def close(self) -> None:
        self.calls.append("closed")


def test_the_application_is_closed_once_after_the_last_event() -> None:
    """`close` runs after the last answer, whatever the number of events."""
    app = Application()

    async def go() -> None:
        async with runtime(app, close=app.close) as bench:
            for path in ("/1", "/2", "/3"):
                await bench.get(path)

    asyncio.run(go())

    assert app.calls == ["/1", "/2", "/3", "closed"]


def test_init_waits_for_the_load() -> None:
    """While init has time left, /next is not called before the model is ready."""

    async def go() -> None:
        loaded = asyncio.Event()
        async with runtime(json_app(), ready=loaded.wait) as bench:
            exchange = bench.server.invoke(to_event("GET", "/"))
            await asyncio.sleep(0.05)
            assert not bench.server.polled.is_set()
            loaded.set()
            await asyncio.wait_for(exchange.finished.wait(), PATIENCE_S)

    asyncio.run(go())


def test_init_has_a_time_limit() -> None:
    """A load that takes longer than init continues while events are served."""

    async def go() -> None:
        loaded = asyncio.Event()
        async with runtime(json_app(), ready=loaded.wait, init_ends=time.monotonic() + 0.05) as bench:
            await bench.still_serves()
            loaded.set()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("on-demand", INIT_S),
        ("", INIT_S),
        ("provisioned-concurrency", 120),
        ("snap-start", 120),
        ("lambda-managed-instances", 120),
    ],
)
def test_init_lasts_as_long_as_lambda_allows(kind: str, seconds: float) -> None:
    """On demand it has ten seconds. Where no request waits, it has 130 s or the timeout, less a margin."""
    environ = {"AWS_LAMBDA_INITIALIZATION_TYPE": kind}

    assert init_seconds(environ) == init_seconds(environ, 60) == seconds < 130
    assert init_seconds(environ, 900) == (INIT_S if seconds == INIT_S else 890)
    assert INIT_S < 10


SNAP = {"AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start"}


def hooks(calls: list[str], *, before: Exception | None = None, after: Exception | None = None) -> snapstart.Hooks:
    async def work(name: str, error: Exception | None) -> None:
        calls.append(name)
        if error is not None:
            raise error

    return snapstart.Hooks(lambda: work("before", before), lambda: work("after", after))


def test_snapstart_runs_its_hooks_around_the_restore() -> None:
    """The order is the before hook, /restore/next, the after hook and then events."""
    calls: list[str] = []

    async def go() -> None:
        async with runtime(json_app(), environ=SNAP, hooks=hooks(calls)) as bench:
            await asyncio.wait_for(bench.server.snapshot.wait(), PATIENCE_S)
            assert calls == ["before"]
            assert not bench.server.polled.is_set()
            bench.server.restored.set()
            await bench.still_serves()
            assert calls == ["before", "after"]

    asyncio.run(go())


def test_restore_is_not_called_without_snapstart() -> None:
    """/restore/next exists only with SnapStart."""
    calls: list[str] = []

    async def go() -> None:
        async with runtime(json_app(), hooks=hooks(calls)) as bench:
            await bench.still_serves()
            assert not bench.server.snapshot.is_set()

    asyncio.run(go())

    assert calls == []


def test_failure_before_the_snapshot_is_an_init_error() -> None:
    """No snapshot is taken of a process whose before hook failed."""

    async def go() -> None:
        async with runtime(json_app(), environ=SNAP, hooks=hooks([], before=ValueError("secret"))) as bench:
            assert await bench.ended() == 64
            assert bench.server.init_errors[0]["errorType"] == "Runtime.BeforeSnapshotError"
            assert "secret" not in str(bench.server.init_errors)

    asyncio.run(go())


def test_failure_after_the_restore_is_a_restore_error() -> None:
    """The process reports the error and ends."""

    async def go() -> None:
        async with runtime(json_app(), environ=SNAP, hooks=hooks([], after=ValueError("secret"))) as bench:
            bench.server.restored.set()
            assert await bench.ended() == 65
            assert bench.server.restore_errors[0]["errorType"] == "Runtime.AfterRestoreError"
            assert "secret" not in str(bench.server.restore_errors)

    asyncio.run(go())


def test_stopping_finishes_the_running_event() -> None:
    """SIGTERM ends the wait for events. The running answer is completed and the application closed."""

    async def go() -> None:
        app = Application()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            bench.runtime.stop()
            await asyncio.sleep(0)
            await app(scope, receive, send)

        async with runtime(slow, close=app.close) as bench:
            assert (await bench.get("/last")).status == 200
            assert await bench.ended() == 0
        assert app.calls == ["/last", "closed"]

    asyncio.run(go())


def test_reseeding_changes_the_random_numbers() -> None:
    """Processes restored from one snapshot must not draw the same numbers."""
    import random

    random.seed(1)
    same = random.random()
    random.seed(1)
    snapstart.reseed()

    assert random.random() != same


def test_priming_answers_a_chat_and_an_extraction() -> None:
    """The snapshot then holds all imports and compiled grammars of both. All leases are released."""
    from core.settings import keys
    from tests.fakes import fake_service

    fakes = fake_service(api_keys=keys("secret"))

    asyncio.run(snapstart.prime(fakes.service, time.monotonic() + 5))

    chat, extraction = fakes.engine.requests
    assert (chat.grammar, chat.max_tokens) == (None, 1)
    assert extraction.grammar is not None
    assert (fakes.host.leases, fakes.engine.running) == (0, 0)
