"""Host: loading once, lending, swapping, and what is left when something fails. Over fake engines."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import core.host
from core.engine.generation import EngineConfig
from core.errors import InvalidRequest, ModelUnavailable
from core.host import Host
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.store import Store
from core.timeline import Timeline
from tests.fakes import CARD, ScriptedEngine
from tests.gguf_files import tiny_model, write


class Loader:
    """Counts loads; fails for the names in `broken`; waits for `gate` before each load."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.broken: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.engines: list[ScriptedEngine] = []

    def __call__(self, file: ModelFile, config: EngineConfig, progress: Any) -> ScriptedEngine:
        assert self.gate.wait(10)
        self.loads.append(file.name)
        if file.name in self.broken:
            raise InvalidRequest(f"The model '{file.name}' cannot be loaded.")
        engine = ScriptedEngine(card=replace(CARD, name=file.name, path=str(file.path)))
        engine.config = config
        self.engines.append(engine)
        return engine


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write(tmp_path, f"{name}.gguf", tiny_model())
    return tmp_path


def make(models: Path, loader: Loader, **settings: Any) -> Host:
    settings = {"model_path": str(models / "a.gguf"), "models_dir": models, **settings}
    return Host(Settings(**settings), Store(models), Timeline(), loader)


def test_many_first_requests_load_once(models: Path) -> None:
    """The first request loads the model; those that come meanwhile wait for the same load."""
    loader = Loader()
    host = make(models, loader)

    async def main() -> None:
        assert host.state().status == "available"
        leases = await asyncio.gather(*[host.lease() for _ in range(5)])
        assert host.state().status == "ready"
        for lease in leases:
            lease.release()
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["a"]
    assert loader.engines[0].closed


def test_no_time_left_is_a_503_with_a_hint(models: Path) -> None:
    """A request whose deadline passes during the load gets an answer in time, and the load goes on."""
    loader = Loader()
    loader.gate.clear()
    host = make(models, loader)

    async def main() -> None:
        with pytest.raises(ModelUnavailable) as caught:
            await host.lease(time.monotonic() + 0.05)
        assert caught.value.retry_after is not None
        loader.gate.set()
        (await host.lease()).release()
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["a"]


def test_a_failed_load_is_told_and_not_repeated_by_every_request(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason stands in the state; a later request tries again."""
    loader = Loader()
    loader.broken = {"a"}
    host = make(models, loader)

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(ModelUnavailable, match="cannot be loaded"):
                await host.lease()
        assert loader.loads == ["a"]
        assert "cannot be loaded" in (host.state().error or "")
        loader.broken = set()
        monkeypatch.setattr(core.host, "RETRY_S", 0.0)
        (await host.lease()).release()
        assert host.state().error is None
        await host.close(1)

    asyncio.run(main())


def test_swap_lets_running_answers_finish_on_the_old_engine(models: Path) -> None:
    """The old engine is freed when its last lease is back, not before."""
    loader = Loader()
    host = make(models, loader)

    async def main() -> None:
        old = await host.lease()
        state = await host.swap("b.gguf", EngineConfig(n_ctx=128))
        assert (state.status, state.model) == ("ready", "b")
        assert not loader.engines[0].closed
        new = await host.lease()
        assert new.engine.card.name == "b"
        assert new.engine.config.n_ctx == 128
        old.release()
        new.release()
        await host.close(1)

    asyncio.run(main())
    assert [engine.closed for engine in loader.engines] == [True, True]


def test_a_swap_that_fails_changes_nothing(models: Path) -> None:
    """The old model goes on serving, and the caller is told why."""
    loader = Loader()
    loader.broken = {"b"}
    host = make(models, loader)

    async def main() -> None:
        (await host.lease()).release()
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            await host.swap("b.gguf", EngineConfig())
        assert (host.state().status, host.state().model) == ("ready", "a")
        (await host.lease()).release()
        await host.close(1)

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_without_room_for_two_the_old_one_goes_first(
    models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Answers finish, new requests wait; if the new model fails, the old one is loaded again before the error."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    loader = Loader()
    loader.broken = {"b"} if fails else set()
    host = make(models, loader)

    async def main() -> None:
        old = await host.lease()
        swap = asyncio.create_task(host.swap("b.gguf", EngineConfig()))
        await asyncio.sleep(0.1)
        assert not swap.done()
        waiting = asyncio.create_task(host.lease())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert host.state().loading.phase == "swap"  # type: ignore[union-attr]
        old.release()
        lease = await waiting
        assert ("a" if fails else "b") == lease.engine.card.name
        if fails:
            with pytest.raises(InvalidRequest, match="cannot be loaded"):
                await swap
        else:
            await swap
        lease.release()
        assert host.state().loading is None
        await host.close(1)

    asyncio.run(main())
    assert (["a", "b", "a"] if fails else ["a", "b"]) == loader.loads


def test_a_model_path_that_is_missing_never_falls_back(models: Path) -> None:
    """MODEL_PATH was asked for; serving the embedded model in its place would be a lie."""
    host = make(models, Loader(), model_path=str(models / "missing.gguf"))

    async def main() -> None:
        assert host.state().status == "unloaded"
        assert "missing.gguf" in (host.state().error or "")
        with pytest.raises(ModelUnavailable, match=r"missing\.gguf"):
            await host.lease()
        await host.close(0)

    asyncio.run(main())


def test_nothing_configured_and_no_embedded_model_is_unloaded_with_hints(models: Path) -> None:
    """The error of a request says what to set."""
    host = make(models, Loader(), model_path=None, embedded_model="off")

    async def main() -> None:
        assert (host.state().status, host.state().model) == ("unloaded", None)
        with pytest.raises(ModelUnavailable, match="MODEL_PATH"):
            await host.lease()
        await host.close(0)

    asyncio.run(main())


class SlowArrival:
    """Tensors that come when `arrived` is set, or fail."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.error: ModelUnavailable | None = None

    def wait(self) -> None:
        assert self.arrived.wait(10)
        if self.error:
            raise self.error

    def progress(self) -> tuple[int, int]:
        return (42, 100)

    def cancel(self) -> None:
        self.arrived.set()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_lent_while_its_tensors_arrive(models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Templates and tokens need no weights; if they never come, the model is given up and the state says so."""
    arrival = SlowArrival()
    arrival.error = ModelUnavailable("The bytes do not match.") if fails else None
    loader = Loader()
    host = make(models, loader)
    opened = host._store.open

    def arriving(*args: Any, **kwargs: Any) -> ModelFile:
        return replace(opened(*args, **kwargs), arrival=arrival)

    monkeypatch.setattr(host._store, "open", arriving)

    async def main() -> None:
        (await host.lease()).release()
        for _ in range(100):
            state = host.state()
            if state.loading is not None and state.loading.phase == "download":
                break
            await asyncio.sleep(0.02)
        assert (state.loading.percent, state.status) == (42, "available")  # type: ignore[union-attr]
        arrival.arrived.set()
        state = await host.wait_ready(5)
        if fails:
            assert (state.engine, state.error) == (None, "The bytes do not match.")
        else:
            assert state.status == "ready"
        await host.close(1)

    asyncio.run(main())
    assert loader.engines[0].closed
