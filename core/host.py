"""Host: the served model's life. Loads it, swaps it, lends it out; knows no HTTP and no sources.

States: `unloaded` (nothing to serve) -> `available` (a model is on this machine, not in memory) -> `ready`.
`loading` and `error` are reported beside the state, never instead of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from core import background
from core.engine.interface import Engine, EngineConfig
from core.errors import ApiError, Busy, ModelUnavailable
from core.lending import Lease, Loaded, Served
from core.loader import LoadEngine, Loader, Loading, load_llama
from core.selection import Selection, select
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import Reference
from core.store.store import Store
from core.store.target import free_memory, megabytes
from core.timeline import Timeline

log = logging.getLogger("slm.host")

Status = Literal["unloaded", "available", "ready"]

MOST_SWAPS = 4  # one at a time, the others wait
KV_BYTES_PER_TOKEN = 64 << 10  # between SmolLM2's 23 KiB and Llama 3 8B's 128 KiB; only to guess what a swap needs


@dataclass(frozen=True, slots=True)
class HostState:
    """A snapshot. `model` is the name served, or the one that a first request would load; None if there is none."""

    status: Status
    model: str | None
    loading: Loading | None
    error: str | None  # of the last load or engine that failed, in our words
    engine: Engine | None
    path: str | None = None  # of `model`, where it is on this machine
    leases: int = 0  # requests that hold an engine now, a swapped-out one included


def config_of(settings: Settings) -> EngineConfig:
    """How the settings say a model is loaded."""
    return EngineConfig(
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        n_parallel=settings.n_parallel,
        max_queue=settings.max_queue,
        repack=settings.repack != "off",
    )


class Host:
    """Thread-safe. The async methods may be called on any loop; loads run in threads of the host's own."""

    def __init__(self, settings: Settings, store: Store, timeline: Timeline, load: LoadEngine = load_llama) -> None:
        self._settings = settings
        self._store = store
        self._loader = Loader(settings, store, timeline, load)
        self._served = Served()
        self._lock = threading.Lock()
        self._selection: Selection | None = None  # under the lock
        self._swapping = threading.Lock()
        self._swaps: set[Future[None]] = set()

    @property
    def boot(self) -> dict[str, str | None]:
        """What the settings led to: chosen_by, reason, reference, path."""
        return self._chosen().report()

    def state(self) -> HostState:
        self._served.drop_failed()
        selection, _ = self._wanted()
        served, loading = self._served, self._loader.progress()
        error = None if served.error is None else served.error.message
        status: Status
        if (held := served.current) is not None:
            status = "available" if self._loader.arriving else "ready"
            card = held.engine.card
            return HostState(status, card.name, loading, error, held.engine, card.path, served.lent)
        status = "available" if selection.is_local else "unloaded"
        return HostState(status, selection.name, loading, error or selection.error, None, selection.path, served.lent)

    def start(self, *, load: bool | None = None) -> None:
        """Begin what the settings ask for, in a thread: download what is missing, and load if AUTO_PRELOAD (or `load`).

        Needs no event loop; returns once llama.cpp is imported. Does nothing if something is under way or loaded.
        """
        selection = self._chosen()
        load = self._settings.auto_preload if load is None else load
        if selection.reference is None:
            if selection.error is not None:
                log.error("%s", selection.error)
            return
        if not selection.is_local and self._settings.model_target == "memory":
            load = True  # what is downloaded into memory is there only as a loaded model
        if load:
            if not self._begin(lambda: self._load(selection, config_of(self._settings))):
                return
            # In this thread, beside the file's check in the other one: the load in C begins as soon as both are done,
            # and whatever the caller imports next no longer takes turns with it.
            self._loader.import_bindings()
        elif not selection.is_local:
            self._begin(lambda: self._download(selection))

    async def lease(self, deadline: float | None = None) -> Lease:
        """The engine, loading it first if need be. Waits at most until `deadline` (monotonic).

        Raises ModelUnavailable: nothing configured, the load failed (the reason in our words), or no time left (with
        Retry-After); Busy if as many requests wait for the load as the engine would take. A load that failed is tried
        again by a later call, not by every call.
        """
        return await self._lease(deadline, most=self._settings.n_parallel + self._settings.max_queue)

    async def wait_ready(self, seconds: float) -> HostState:
        """Start the load if there is something to load, and return when it is ready, failed or the time is up."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ApiError):
            (await self._lease(deadline)).release()
        # Tensors may still be arriving, or a swap be under way: there is no one future for both.
        while self.state().loading is not None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return self.state()

    async def swap(self, reference: Reference | None, config: EngineConfig) -> HostState:
        """Load `reference`, or with None the model served now anew, and serve it; running answers finish on the old
        engine. Raises what the store or the engine say of the new model; the old one then still serves. Raises Busy if
        MOST_SWAPS are under way or wait for their turn.
        """
        with self._lock:
            if len(self._swaps) >= MOST_SWAPS:
                raise Busy(f"{MOST_SWAPS} reloads are under way already; try again later.", retry_after=10)
            swap = background.start("swap", lambda: self._swap(reference, config))
            self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        await asyncio.wrap_future(swap)
        return self.state()

    async def close(self, grace: float) -> None:
        """No new leases; wait up to `grace` seconds for the running ones, then cancel and free."""
        self._loader.cancel()
        await asyncio.wrap_future(background.start("close", lambda: self._served.close(grace)))

    # Loading

    def _chosen(self) -> Selection:
        idle = not self._served.busy and self._served.current is None
        with self._lock:
            if self._selection is None or (not self._selection.is_local and idle):
                self._selection = select(self._settings, self._store)
            return self._selection

    def _wanted(self) -> tuple[Selection, EngineConfig]:
        """What the next request would be served by, if nothing is loaded."""
        return self._served.last or (self._chosen(), config_of(self._settings))

    async def _lease(self, deadline: float | None, most: int | None = None) -> Lease:
        while (lease := self._served.lend()) is None:
            if not self._served.busy:
                self._served.check_retry()
                selection, config = self._wanted()
                if selection.reference is None:
                    raise ModelUnavailable(selection.error or _NOTHING, retry_after=None)
                self._begin(functools.partial(self._load, selection, config))
            if not await self._served.wait(deadline, most):
                raise self._still_loading()
        return lease

    def _still_loading(self) -> ModelUnavailable:
        loading = self._loader.progress()
        share = "" if loading is None or loading.percent is None else f" ({loading.percent} %)"
        return ModelUnavailable(f"The model is still loading{share}; try again.", retry_after=2)

    def _begin(self, work: Callable[[], None]) -> bool:
        """Run `work` in a thread of its own, unless there is nothing to do for it."""
        if not self._served.begin():
            return False

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a foreign library's surprise, too: nobody may wait for ever
                self._served.fail(error)
            finally:
                self._loader.announce(None)
                self._served.settle()

        threading.Thread(target=run, name="load", daemon=True).start()
        return True

    def _download(self, selection: Selection) -> None:
        self._loader.download(selection)
        with self._lock:
            self._selection = None  # to be looked up again: it is here now

    def _load(self, selection: Selection, config: EngineConfig) -> None:
        """Load a model where none is served. Raises what the loader raises."""
        assert selection.reference is not None
        file = self._loader.open(selection)
        held = self._loader.load(file, selection.reference, config)
        selection = replace(selection, is_local=True, path=str(file.path))
        if selection.chosen_by != "/reload":
            with self._lock:
                self._selection = selection
        lease = self._served.hold(held)  # it must not be freed while it warms up
        try:
            self._served.publish(held, selection)
            if not self._served.awaited:
                held.engine.warm()
        finally:
            lease.release()
        self._await_tensors(held)

    def _await_tensors(self, held: Loaded) -> None:
        """Block until a published model's tensors are there; give the model up and raise if they do not come."""
        try:
            self._loader.wait_arrival()
        except Exception as error:
            self._served.give_up(held, error)
            raise

    # Swapping

    def _swap(self, reference: Reference | None, config: EngineConfig) -> None:
        """One swap at a time; a load under way is waited for."""
        with self._swapping:
            old = self._served.wait_idle()
            reference = reference or self._wanted()[0].reference
            if reference is None:
                raise ModelUnavailable(_NOTHING, retry_after=None)
            file = self._store.open(reference)
            selection = Selection("/reload", "it was asked for", reference, is_local=True, path=str(file.path))
            try:
                if old is None or self._room_for(file, config):
                    # The old one serves meanwhile.
                    self._publish(self._loader.load(file, reference, config), selection)
                else:
                    self._swap_in_place(old, file, selection, config)
            finally:
                self._loader.announce(None)

    def _room_for(self, file: ModelFile, config: EngineConfig) -> bool:
        need = int(file.size_bytes * 1.1) + config.n_ctx * KV_BYTES_PER_TOKEN
        free = free_memory()
        if free and need > free:
            log.info("no room for two models (%s needed, %s free)", megabytes(need), megabytes(free))
            return False
        return True

    def _publish(self, held: Loaded, selection: Selection) -> None:
        """Change over to a loaded model."""
        self._served.publish(held, selection)
        self._await_tensors(held)

    def _swap_in_place(self, old: Loaded, file: ModelFile, selection: Selection, config: EngineConfig) -> None:
        """Free the old model first: new requests wait, running answers get RELOAD_GRACE_S. If the new model fails, the
        old one returns; if that fails, too, the next request tries it again."""
        assert selection.reference is not None
        self._loader.announce(Loading("swap", file.name))
        self._served.withdraw()
        try:
            if not self._served.wait_freed(old, self._settings.reload_grace_s):
                file.discard()
                error = ModelUnavailable("The model served before is still in use; its memory could not be freed.")
                self._served.fail(error)
                raise error
            try:
                held = self._loader.load(file, selection.reference, config)
            except Exception:
                log.warning("the new model failed; loading the old one again")
                self._restore()
                raise
            self._publish(held, selection)
        finally:
            self._served.settle()

    def _restore(self) -> None:
        """Load the model that was served last; what goes wrong is the state's to tell."""
        try:
            self._load(*self._wanted())
        except Exception as error:  # noqa: BLE001 - the swap's own error is the caller's
            self._served.fail(error)


_NOTHING = (
    "No model is configured: set MODEL_PATH, or AUTO_REPO_ID and AUTO_FILENAME; "
    "or POST /load to download one, then POST /reload with its path."
)
