"""Load, swap and lend the served model.

States: `unloaded` (no local model) -> `available` (a local model that is not in memory) -> `ready`.
`loading` and `error` are reported in addition to the state.
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
from typing import Generic, Literal, TypeVar

from msgspec import structs

from core import background
from core.engine.interface import EngineConfig, LoadedEngine
from core.errors import ApiError, Busy, ModelUnavailable
from core.lending import E, Lease, Loaded, Served
from core.loader import LoadEngine, Loader, Loading
from core.selection import Selection, select
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import Reference
from core.store.store import Store
from core.store.target import free_memory, megabytes
from core.timeline import Timeline

logger = logging.getLogger("slm.host")

Status = Literal["unloaded", "available", "ready"]
E_co = TypeVar("E_co", bound=LoadedEngine, covariant=True)

MOST_SWAPS = 4  # running and waiting; only one runs at a time
KV_BYTES_PER_TOKEN = (
    64 << 10
)  # between SmolLM2's 23 KiB and Llama 3 8B's 128 KiB; estimates the memory that a swap needs


@dataclass(frozen=True, slots=True)
class HostState(Generic[E_co]):
    """A snapshot. `model` is the served model or the one that the first request would load, None without one."""

    status: Status
    model: str | None
    loading: Loading | None
    error: str | None  # of the last load or engine that failed
    engine: E_co | None
    path: str | None = None  # of `model`, if it is a local file
    leases: int = 0  # outstanding leases, including those of swapped-out engines


def config_of(settings: Settings) -> EngineConfig:
    """Return the engine configuration of the settings."""
    return EngineConfig(
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        n_parallel=settings.n_parallel,
        max_queue=settings.max_queue,
        repack=settings.repack != "off",
    )


class Host(Generic[E]):
    """Thread-safe. The async methods may run on any event loop; loads run in the host's own threads.

    `load` loads a file, and `select` chooses the model from the settings.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        timeline: Timeline,
        load: LoadEngine[E],
        select: Callable[[Settings, Store], Selection] = select,
    ) -> None:
        self._settings = settings
        self._store = store
        self._select = select
        self._loader = Loader(settings, store, timeline, load)
        self._served: Served[E] = Served()
        self._lock = threading.Lock()
        self._selection: Selection | None = None  # under the lock
        self._swapping = threading.Lock()
        self._swaps: set[Future[None]] = set()

    @property
    def boot(self) -> dict[str, str | None]:
        """The model that the settings select, as chosen_by, reason, reference and path."""
        return self._selected().report()

    def state(self) -> HostState[E]:
        self._served.drop_failed()
        selection, _ = self._next_load()
        served, loading = self._served, self._progress()
        error = None if served.error is None else served.error.message
        status: Status
        if (loaded := served.current) is not None:
            status = "ready" if self._loader.arriving is None else "available"
            card = loaded.engine.card
            return HostState(status, card.name, loading, error, loaded.engine, card.path, served.lent)
        status = "available" if selection.is_local else "unloaded"
        return HostState(status, selection.name, loading, error or selection.error, None, selection.path, served.lent)

    def start(self, *, load: bool | None = None) -> None:
        """Start a thread that downloads a missing model and, with AUTO_PRELOAD or `load`, loads it.

        Needs no event loop. Returns once llama.cpp is imported. Does nothing while a model is loading or loaded.
        """
        selection = self._selected()
        load = self._settings.auto_preload if load is None else load
        if selection.reference is None:
            if selection.error is not None:
                # Clients see the error, so it has no folders. The log has them.
                logger.error("%s MODEL_PATH is %r.", selection.error, self._settings.model_path)
            return
        if not selection.is_local and self._settings.model_target == "memory":
            load = True  # a download into memory exists only as a loaded model
        if load:
            if not self._begin(lambda: self._load(selection, config_of(self._settings))):
                return
            # Import in this thread while the load thread checks the file. The load in C begins when both are done, and
            # then does not compete with the caller's next imports for the interpreter lock.
            self._loader.import_bindings()
        elif not selection.is_local:
            self._begin(lambda: self._download(selection))

    async def lease(self, deadline: float | None = None) -> Lease[E]:
        """Return a lease of the engine, loading the model first if necessary. Waits no longer than `deadline`.

        Raises ModelUnavailable if no model is configured, the load failed, or the deadline passed, and Busy if as many
        requests already wait as the engine would accept. A failed load is retried by calls after RETRY_S.
        """
        return await self._lease(deadline, most=self._settings.n_parallel + self._settings.max_queue)

    async def wait_ready(self, seconds: float) -> HostState[E]:
        """Start the load if a model is configured, and return when it is ready, has failed, or after `seconds`."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ApiError):
            (await self._lease(deadline)).release()
        # Tensors may still be downloading or a swap may be running; no single future covers both.
        while self.state().loading is not None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return self.state()

    async def swap(self, reference: Reference | None, config: EngineConfig) -> HostState[E]:
        """Load and serve `reference` (None: the served model again). Running requests finish on the old engine.

        If the new model fails, raises what the store or the engine raised, and the old model stays. Raises Busy if
        MOST_SWAPS are running or waiting.
        """
        with self._lock:
            if len(self._swaps) >= MOST_SWAPS:
                raise Busy(f"{MOST_SWAPS} reloads are already running or waiting. Try again later.", retry_after=10)
            swap = background.start("swap", lambda: self._swap(reference, config))
            self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        await asyncio.wrap_future(swap)
        return self.state()

    async def close(self, grace: float) -> None:
        """Stop lending, wait up to `grace` seconds for running requests, then cancel them and free the engine."""
        self._loader.cancel()
        await asyncio.wrap_future(background.start("close", lambda: self._served.close(grace)))

    # Loading

    def _selected(self) -> Selection:
        idle = not self._served.busy and self._served.current is None
        with self._lock:
            if self._selection is None or (not self._selection.is_local and idle):
                self._selection = self._select(self._settings, self._store)
            return self._selection

    def _next_load(self) -> tuple[Selection, EngineConfig]:
        """Return what the next request would load."""
        return self._served.last or (self._selected(), config_of(self._settings))

    async def _lease(self, deadline: float | None, most: int | None = None) -> Lease[E]:
        while (lease := self._served.lend()) is None:
            if not self._served.busy:
                self._served.check_retry()
                selection, config = self._next_load()
                if selection.reference is None:
                    raise ModelUnavailable(selection.error or _NOTHING, retry_after=None)
                self._begin(functools.partial(self._load, selection, config))
            if not await self._served.wait(deadline, most):
                raise self._still_loading()
        return lease

    def _progress(self) -> Loading | None:
        """Return the load under way. The tensors of a model may still be arriving after it is served."""
        arriving = self._loader.arriving
        if arriving is not None and arriving.arrival is not None:
            return Loading("download", arriving.name, *arriving.arrival.progress())
        return self._loader.loading

    def _still_loading(self) -> ModelUnavailable:
        loading = self._progress()
        share = "" if loading is None or loading.percent is None else f" ({loading.percent} %)"
        return ModelUnavailable(f"The model is still loading{share}. Try again later.", retry_after=2)

    def _begin(self, work: Callable[[], None]) -> bool:
        """Run `work` in a new thread. Return False if a model is served or already being loaded."""
        if not self._served.begin():
            return False

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - any exception must end the wait of requests
                self._served.fail(error)
            finally:
                self._loader.announce(None)
                self._served.settle()

        threading.Thread(target=run, name="load", daemon=True).start()
        return True

    def _download(self, selection: Selection) -> None:
        self._loader.download(selection)
        with self._lock:
            self._selection = None  # select again: the model is local now

    def _load(self, selection: Selection, config: EngineConfig) -> None:
        """Load a model while none is served. Raises what the loader raises."""
        assert selection.reference is not None
        file = self._loader.open(selection)
        loaded = self._loader.load(file, selection.reference, config)
        selection = replace(selection, is_local=True, path=str(file.path))
        if selection.chosen_by != "/reload":
            with self._lock:
                self._selection = selection
        lease = self._served.hold(loaded)  # keeps it from being freed while it warms up
        try:
            self._served.publish(loaded, selection)
            if not self._served.awaited:
                loaded.engine.warm()
        finally:
            lease.release()
        self._await_tensors(loaded)

    def _await_tensors(self, loaded: Loaded[E]) -> None:
        """Block until the tensors of a published model are downloaded. If that fails, stop serving it and raise."""
        try:
            self._loader.wait_arrival()
        except Exception as error:
            self._served.give_up(loaded, error)
            raise

    # Swapping

    def _swap(self, reference: Reference | None, config: EngineConfig) -> None:
        """Run one swap at a time, after a running load."""
        with self._swapping:
            old = self._served.wait_idle()
            reference = reference or self._next_load()[0].reference
            if reference is None:
                raise ModelUnavailable(_NOTHING, retry_after=None)
            file = self._store.open(reference)
            selection = Selection("/reload", "requested by POST /reload", reference, is_local=True, path=str(file.path))
            try:
                if old is None or self._room_for(file, config):
                    # The old model serves requests in the meantime.
                    self._publish(self._loader.load(file, reference, config), selection)
                else:
                    self._swap_in_place(old, file, selection, config)
            finally:
                self._loader.announce(None)

    def _room_for(self, file: ModelFile, config: EngineConfig) -> bool:
        need = int(file.size_bytes * 1.1) + config.n_ctx * KV_BYTES_PER_TOKEN
        free = free_memory()
        if free and need > free:
            logger.info("no room for two models (%s needed, %s free)", megabytes(need), megabytes(free))
            return False
        return True

    def _publish(self, loaded: Loaded[E], selection: Selection) -> None:
        """Switch to a loaded model."""
        self._served.publish(loaded, selection)
        self._await_tensors(loaded)

    def _swap_in_place(self, old: Loaded[E], file: ModelFile, selection: Selection, config: EngineConfig) -> None:
        """Free the old model before loading the new one: both do not fit into memory.

        New requests wait; running ones get RELOAD_GRACE_S. If the new model fails, the old one is loaded again; if that
        fails too, the next request retries it.
        """
        assert selection.reference is not None
        self._loader.announce(Loading("swap", file.name))
        self._served.withdraw()
        try:
            if not self._served.wait_freed(old, self._settings.reload_grace_s):
                file.discard()
                error = ModelUnavailable(
                    "The old model is still in use, so its memory could not be freed. Try again later."
                )
                self._served.fail(error)
                raise error
            if file.in_memory and self._settings.repack == "auto" and not self._room_for(file, config):
                config = structs.replace(
                    config, repack=False
                )  # a repacked copy of the weights does not fit into memory too
            try:
                loaded = self._loader.load(file, selection.reference, config)
            except Exception:
                logger.warning("the new model failed; loading the old one again")
                self._restore()
                raise
            self._publish(loaded, selection)
        finally:
            self._served.settle()

    def _restore(self) -> None:
        """Load the last served model again. An error becomes part of the state."""
        try:
            self._load(*self._next_load())
        except Exception as error:  # noqa: BLE001 - the caller gets the swap's error
            self._served.fail(error)


_NOTHING = (
    "No model is configured. Set MODEL_PATH, or AUTO_REPO_ID and AUTO_FILENAME; "
    "or POST /load to download a model, then POST /reload with its path."
)
