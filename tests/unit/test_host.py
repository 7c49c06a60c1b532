"""Host with fake engines: loading once, leases, swapping and failures."""

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
from msgspec import structs

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
    """A loader that records loads, fails for the names in `broken` and waits for `gate` before each load."""

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
        engine = ScriptedEngine(card=structs.replace(CARD, name=file.name, path=str(file.path)))
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
    """Requests that arrive during the load wait for it."""
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


def test_a_deadline_during_the_load_is_a_503(models: Path) -> None:
    """The error has a Retry-After, and the load continues."""
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


def test_a_failed_load_is_not_repeated_by_every_request(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state holds the error; a later request retries."""
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


def test_running_answers_finish_on_the_old_engine(models: Path) -> None:
    """After a swap, the old engine is freed when its last lease is released."""
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
    """The state holds the error; the next request loads the served model again, with its config."""
    loader = Loader()
    host = make(models, loader)

    async def main() -> None:
        await host.swap(File(str(models / "b.gguf")), EngineConfig(n_ctx=128))
        lease = await host.lease()
        loader.engines[0].failed = ModelUnavailable("The engine failed.")

        state = host.state()
        assert (state.status, state.model, state.error, state.engine) == ("available", "b", "The engine failed.", None)
        assert not loader.engines[0].closed

        new_lease = await host.lease()
        assert (host.state().status, host.state().error) == ("ready", None)
        assert new_lease.engine is loader.engines[1]
        assert new_lease.engine.config.n_ctx == 128
        lease.release()
        new_lease.release()
        await host.close(1)

    asyncio.run(main())
    assert loader.loads == ["b", "b"]
    assert [engine.closed for engine in loader.engines] == [True, True]


def test_a_swap_that_fails_changes_nothing(models: Path) -> None:
    """The old model continues to serve, and the caller gets the error."""
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
def test_without_memory_for_both_the_old_model_is_freed_first(
    models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Running answers finish and new requests wait. If the new model fails, the old one is loaded again."""
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


def test_a_missing_model_path_never_falls_back(models: Path) -> None:
    """The embedded model must not answer in place of MODEL_PATH."""
    host = make(models, Loader(), model_path=str(models / "missing.gguf"))

    async def main() -> None:
        assert host.state().status == "unloaded"
        assert "missing.gguf" in (host.state().error or "")
        with pytest.raises(ModelUnavailable, match=r"missing\.gguf"):
            await host.lease()
        await host.close(0)

    asyncio.run(main())


def test_without_any_model_the_host_is_unloaded(models: Path) -> None:
    """The error of a request says which variable to set."""
    host = make(models, Loader(), model_path=None, embedded_model="off")

    async def main() -> None:
        assert (host.state().status, host.state().model) == ("unloaded", None)
        with pytest.raises(ModelUnavailable, match="MODEL_PATH"):
            await host.lease()
        await host.close(0)

    asyncio.run(main())


class SlowArrival:
    """A background download that completes, or fails, when `arrived` is set."""

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
def test_a_model_is_leased_while_its_tensors_arrive(models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Templates and the tokenizer need no weights. If the download fails, the engine is dropped with the error."""
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
    """A wrapper of `Store.open` that gives the n-th opened file `arrivals[n]` and counts releases."""

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
def test_after_a_failed_swap_the_old_model_is_downloaded_again(
    models: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is ready when its tensors have arrived and dropped if their download fails."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    loader = Loader()
    loader.broken = {"b"}
    host = make(models, loader)
    second_arrival = SlowArrival()
    second_arrival.error = ModelUnavailable("The bytes do not match.") if fails else None
    Opening(host, monkeypatch, None, None, second_arrival)

    async def main() -> None:
        (await host.lease()).release()
        swap = asyncio.create_task(host.swap(File("b.gguf"), EngineConfig()))
        await eventually(lambda: host.state().status == "available" and host.state().engine is not None)
        second_arrival.arrived.set()
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


def test_if_both_models_of_a_swap_fail_the_next_request_retries(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state holds the error. The model served last is loaded, not the one in the settings."""
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


def test_a_swap_in_place_cuts_answers_after_the_grace(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New requests wait for the swap, so an endless answer must not block it."""
    monkeypatch.setattr(core.host, "free_memory", lambda: 1)
    loader = Loader()
    host = make(models, loader, reload_grace_s=0.01)

    async def main() -> None:
        endless = await host.lease()
        swap = asyncio.create_task(host.swap(File("b.gguf"), EngineConfig()))
        await eventually(lambda: loader.engines[0].closed)  # stopped: its answers fail and release their leases
        assert loader.loads == ["a"]
        endless.release()
        assert (await swap).model == "b"
        await host.close(1)

    asyncio.run(main())


def test_a_lease_that_is_never_released_fails_the_swap(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old model cannot be freed, so the new one is not loaded and its file is released."""
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
    """Its path is a file descriptor that cannot be opened again. Weights are repacked only if memory allows."""
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


def test_requests_that_wait_for_a_load_are_limited(models: Path) -> None:
    """The limit is the engine's: N_PARALLEL and MAX_QUEUE. Further requests are Busy with a Retry-After."""
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


def test_a_lease_is_released_once(models: Path) -> None:
    """Two threads that release it at once count once; otherwise a model in use could be freed."""
    host = make(models, Loader())
    lease = asyncio.run(host.lease())
    loaded, both = lease._loaded, threading.Barrier(2)

    class Slow(type(lease)):  # type: ignore[misc]
        """Both threads reach the point between reading and clearing, unless a lock excludes one."""

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

    twice = Slow(host._served._lender, loaded)
    assert loaded is not None
    threads = [threading.Thread(target=twice.release) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded.leases == 0
    asyncio.run(host.close(1))


@pytest.mark.parametrize("weights", ["repacked", "on a GPU"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_load_waits_for_weights_that_it_reads(
    models: Path, monkeypatch: pytest.MonkeyPatch, weights: str, fails: bool
) -> None:
    """llama.cpp repacks weights or copies them to the GPU while it loads, so they must have arrived. If their download
    fails, the memory is released."""
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


def test_a_build_without_gpu_does_not_wait_for_weights(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N_GPU_LAYERS has no effect then, and the model is leased while its tensors arrive."""
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


def test_waiting_reloads_are_limited(models: Path) -> None:
    """Reloads run one at a time. A few wait, further ones are Busy with a Retry-After."""
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
