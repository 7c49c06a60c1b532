"""Host: loading once, lending, swapping, and what is left when something fails. Over fake engines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import core.host
import core.lending
from core.engine import native
from core.engine.interface import EngineConfig
from core.errors import Busy, InvalidRequest, ModelUnavailable
from core.host import Host
from core.loader import Loading
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import File
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
        monkeypatch.setattr(core.lending, "RETRY_S", 0.0)
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
        state = await host.swap(File("b.gguf"), EngineConfig(n_ctx=128))
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


def test_an_engine_that_failed_is_dropped_and_loaded_again(models: Path) -> None:
    """The state names the error; the next request loads the model that was served, however it came to be."""
    loader = Loader()
    host = make(models, loader)

    async def main() -> None:
        await host.swap(File(str(models / "b.gguf")), EngineConfig(n_ctx=128))
        lease = await host.lease()
        loader.engines[0].failed = ModelUnavailable("The engine failed.")

        state = host.state()
        assert (state.status, state.model, state.error, state.engine) == ("available", "b", "The engine failed.", None)
        assert not loader.engines[0].closed

        again = await host.lease()
        assert (host.state().status, host.state().error) == ("ready", None)
        assert again.engine is loader.engines[1]
        assert again.engine.config.n_ctx == 128
        lease.release()
        again.release()
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["b", "b"]
    assert [engine.closed for engine in loader.engines] == [True, True]


def test_a_swap_that_fails_changes_nothing(models: Path) -> None:
    """The old model goes on serving, and the caller is told why."""
    loader = Loader()
    loader.broken = {"b"}
    host = make(models, loader)

    async def main() -> None:
        (await host.lease()).release()
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            await host.swap(File("b.gguf"), EngineConfig())
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
        swap = asyncio.create_task(host.swap(File("b.gguf"), EngineConfig()))
        while (loading := host.state().loading) is None or loading.phase != "swap":
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(host.lease())
        done, _ = await asyncio.wait({swap, waiting}, timeout=0.05)
        assert not done
        assert not loader.engines[0].closed
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


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


class Opening:
    """Stands before `Store.open`: the n-th file that is opened arrives as `arrivals[n]` says; counts releases."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch, *arrivals: SlowArrival | None) -> None:
        self._open = host._store.open
        self._arrivals = list(arrivals)
        self.released = 0
        monkeypatch.setattr(host._store, "open", self)

    def __call__(self, *args: Any, **kwargs: Any) -> ModelFile:
        arrival = self._arrivals.pop(0) if self._arrivals else None
        return replace(self._open(*args, **kwargs), arrival=arrival, release=self._release)

    def _release(self) -> None:
        self.released += 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_old_model_may_arrive_again_after_a_failed_swap(
    models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The old model's tensors come anew: it is ready when they are there, and given up if they do not come."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    loader = Loader()
    loader.broken = {"b"}
    host = make(models, loader)
    again = SlowArrival()
    again.error = ModelUnavailable("The bytes do not match.") if fails else None
    Opening(host, monkeypatch, None, None, again)

    async def main() -> None:
        (await host.lease()).release()
        swap = asyncio.create_task(host.swap(File("b.gguf"), EngineConfig()))
        await eventually(lambda: host.state().status == "available" and host.state().engine is not None)
        again.arrived.set()
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            await swap
        state = host.state()
        if fails:
            assert (state.engine, state.error) == (None, "The bytes do not match.")
        else:
            assert (state.status, state.model, state.loading, state.error) == ("ready", "a", None, None)
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["a", "b", "a"]


def test_if_the_old_model_fails_too_the_next_request_loads_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state says why; it is the model served last that is tried again, not the one that the settings name."""
    monkeypatch.setattr(core.lending, "RETRY_S", 0.0)
    loader = Loader()
    host = make(models, loader)
    write(models, "c.gguf", tiny_model())

    async def main() -> None:
        (await host.lease()).release()
        await host.swap(File("b.gguf"), EngineConfig(n_ctx=128))
        monkeypatch.setattr(core.host, "free_memory", lambda: 1)
        loader.broken = {"b", "c"}
        with pytest.raises(InvalidRequest, match="'c' cannot be loaded"):
            await host.swap(File("c.gguf"), EngineConfig())
        state = host.state()
        assert (state.engine, state.model, state.error) == (None, "b", "The model 'b' cannot be loaded.")
        loader.broken = set()
        lease = await host.lease()
        assert (lease.engine.card.name, lease.engine.config.n_ctx) == ("b", 128)
        assert host.state().error is None
        lease.release()
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["a", "b", "c", "b", "b"]


def test_a_swap_in_place_cuts_answers_that_outlast_its_grace(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new request waits meanwhile, so one endless answer must not hold the swap for ever."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    loader = Loader()
    host = make(models, loader, reload_grace_s=0.01)

    async def main() -> None:
        endless = await host.lease()
        swap = asyncio.create_task(host.swap(File("b.gguf"), EngineConfig()))
        await eventually(lambda: loader.engines[0].closed)  # stopped: its answers fail, their leases come back
        assert loader.loads == ["a"]
        endless.release()
        assert (await swap).model == "b"
        await host.close(1)

    asyncio.run(main())


def test_a_lease_that_does_not_come_back_fails_the_swap(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model cannot be freed, so nothing is loaded beside it; what was opened is released."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    monkeypatch.setattr(core.lending, "CUT_S", 0.01)
    loader = Loader()
    host = make(models, loader, reload_grace_s=0.01)
    opening = Opening(host, monkeypatch)

    async def main() -> None:
        lost = await host.lease()
        with pytest.raises(ModelUnavailable, match="still in use"):
            await host.swap(File("b.gguf"), EngineConfig())
        assert (host.state().engine, host.state().leases) == (None, 1)
        assert "still in use" in (host.state().error or "")
        assert (loader.loads, opening.released) == (["a"], 1)
        lost.release()
        assert host.state().leases == 0
        await host.close(1)

    asyncio.run(main())


@pytest.mark.parametrize(("free", "repack", "repacks"), [(1, "auto", False), (1, "on", True), (1 << 40, "auto", True)])
def test_a_model_in_memory_is_reloaded_by_its_reference(
    models: Path, monkeypatch: pytest.MonkeyPatch, free: int, repack: str, repacks: bool
) -> None:
    """Its path is a descriptor's that nobody can open again. A repacked copy is made only if there is room for it."""
    monkeypatch.setattr(core.host, "free_memory", lambda: free)
    loader = Loader()
    host = make(models, loader, repack=repack)
    opened = host._store.open
    references: list[str] = []

    def in_memory(reference: File, **kwargs: Any) -> ModelFile:
        references.append(str(reference))
        return replace(opened(reference, **kwargs), path=Path("/proc/self/fd/99"))

    monkeypatch.setattr(host._store, "open", in_memory)

    async def main() -> None:
        (await host.lease()).release()
        assert (await host.swap(None, EngineConfig(n_ctx=128))).path == "/proc/self/fd/99"
        await host.close(1)

    asyncio.run(main())
    assert references == [str(models / "a.gguf")] * 2
    assert loader.engines[1].config.repack == repacks


def test_no_more_requests_wait_for_a_load_than_the_engine_would_take(models: Path) -> None:
    """The one too many is told to come back; the others are served when the model is there."""
    loader = Loader()
    loader.gate.clear()
    host = make(models, loader, n_parallel=2, max_queue=1)

    async def main() -> None:
        waiting = [asyncio.create_task(host.lease()) for _ in range(3)]
        await eventually(lambda: host._served.waiting == 3)
        with pytest.raises(Busy) as caught:
            await host.lease()
        assert caught.value.retry_after
        loader.gate.set()
        for lease in await asyncio.gather(*waiting):
            lease.release()
        (await host.lease()).release()
        await host.close(1)

    asyncio.run(main())


def test_a_lease_is_given_back_once(models: Path) -> None:
    """Two threads that release at the same moment count as one, or a model would be freed under another request."""
    host = make(models, Loader())
    lease = asyncio.run(host.lease())
    held, both = lease._loaded, threading.Barrier(2)

    class Slow(type(lease)):  # type: ignore[misc]
        """Two threads reach the moment between reading and clearing, unless a lock keeps one of them out."""

        __slots__ = ("value",)

        @property
        def _loaded(self) -> Any:
            value = self.value
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return value

        @_loaded.setter
        def _loaded(self, value: Any) -> None:
            self.value = value

    twice = Slow(host._served._lender, held)
    assert held is not None
    threads = [threading.Thread(target=twice.release) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.leases == 0
    asyncio.run(host.close(1))


@pytest.mark.parametrize("weights", ["repacked", "on a GPU"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_are_read_at_load_are_waited_for(
    models: Path, monkeypatch: pytest.MonkeyPatch, weights: str, fails: bool
) -> None:
    """llama.cpp repacks them, or copies them to the GPU, while it loads: they must be there. If they do not come, the
    memory that held them is given back."""
    monkeypatch.setattr(native, "bindings", lambda: SimpleNamespace(llama_supports_gpu_offload=lambda: True))
    arrival = SlowArrival()
    arrival.error = ModelUnavailable("The bytes do not match.") if fails else None
    loader = Loader()
    settings: dict[str, Any] = {"repack": "on"} if weights == "repacked" else {"n_gpu_layers": 1}
    host = make(models, loader, **settings)
    opening = Opening(host, monkeypatch, arrival)

    async def main() -> None:
        lease = asyncio.create_task(host.lease())
        await eventually(lambda: (host.state().loading or Loading("", "")).percent == 42)
        assert loader.loads == []
        arrival.arrived.set()
        if fails:
            with pytest.raises(ModelUnavailable, match="do not match"):
                await lease
            assert (loader.loads, opening.released) == ([], 1)
        else:
            (await lease).release()
            assert (loader.loads, host.state().status) == (["a"], "ready")
        await host.close(1)

    asyncio.run(main())


def test_without_a_gpu_in_the_build_nothing_waits_for_the_weights(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N_GPU_LAYERS has no effect then; the model is lent while its tensors arrive."""
    monkeypatch.setattr(native, "bindings", lambda: SimpleNamespace(llama_supports_gpu_offload=lambda: False))
    arrival = SlowArrival()
    host = make(models, Loader(), n_gpu_layers=1)
    Opening(host, monkeypatch, arrival)

    async def main() -> None:
        (await host.lease()).release()
        assert not arrival.arrived.is_set()
        arrival.arrived.set()
        await host.close(1)

    asyncio.run(main())


def test_reloads_queue_up_but_not_without_end(models: Path) -> None:
    """One at a time; a few wait, and the one too many is told to come back. None holds a thread that prompts need."""
    loader = Loader()
    host = make(models, loader)

    async def main() -> None:
        (await host.lease()).release()
        loader.gate.clear()
        swaps = [asyncio.create_task(host.swap(File("b.gguf"), EngineConfig())) for _ in range(core.host.MOST_SWAPS)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as caught:
            await host.swap(File("b.gguf"), EngineConfig())
        assert caught.value.retry_after
        loader.gate.set()
        await asyncio.gather(*swaps)
        assert (await host.swap(File("a.gguf"), EngineConfig())).model == "a"
        await host.close(1)

    asyncio.run(main())
