"""Host: which model is served now. Loads it, swaps it, lends it out; knows no HTTP and no sources.

States: `unloaded` (nothing to serve) -> `available` (a model is on this machine, not in memory) -> `ready`.
`loading` and `error` are reported beside the state, never instead of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from core.boot import Choice, choose
from core.engine.generation import Engine, EngineConfig
from core.errors import ApiError, ModelUnavailable
from core.lease import Lease, Lender, Loaded
from core.loader import LoadEngine, Loader, Loading, load_llama
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import File
from core.store.store import Store
from core.store.target import free_memory, megabytes
from core.timeline import Timeline

log = logging.getLogger("slm.host")

Status = Literal["unloaded", "available", "ready"]

RETRY_S = 5.0  # a load that failed is not tried again sooner
KV_BYTES_PER_TOKEN = 64 << 10  # between SmolLM2's 23 KiB and Llama 3 8B's 128 KiB; only to guess what a swap needs


@dataclass(frozen=True, slots=True)
class HostState:
    """A snapshot. `model` is the name served, or the one that a first request would load; None if there is none."""

    status: Status
    model: str | None
    loading: Loading | None
    error: str | None  # of the last load that failed, in our words
    engine: Engine | None


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
        self._lock = threading.Condition()
        self._choice: Choice | None = None
        self._held: Loaded | None = None
        self._lender = Lender()
        self._work: Future[None] | None = None  # a load or swap under way; done as soon as it can be leased, or failed
        self._awaited = False  # a request wants the model that is being loaded
        self._busy = False  # a load's thread is at work, perhaps on tensors that still arrive
        self._error: ApiError | None = None
        self._failed_at = 0.0
        self._closed = False
        self._swapping = threading.Lock()

    @property
    def boot(self) -> dict[str, str | None]:
        """What the settings led to: chosen_by, reason, reference, path."""
        return self._chosen().report()

    def state(self) -> HostState:
        choice = self._chosen()
        with self._lock:
            held, loading = self._held, self._loader.progress()
            error = None if self._error is None else self._error.message
            status: Status
            if held is not None:
                status = "available" if self._loader.arriving else "ready"
                return HostState(status, held.engine.card.name, loading, error, held.engine)
            status = "available" if choice.here else "unloaded"
            return HostState(status, choice.name, loading, error or choice.error, None)

    def start(self, *, load: bool | None = None) -> None:
        """Begin what the settings ask for, in a thread: download what is missing, and load if AUTO_PRELOAD (or `load`).

        Needs no event loop; returns once llama.cpp is imported. Does nothing if something is under way or loaded.
        """
        choice = self._chosen()
        load = self._settings.auto_preload if load is None else load
        if choice.reference is None:
            if choice.error is not None:
                log.error("%s", choice.error)
            return
        if not choice.here and self._settings.model_target == "memory":
            load = True  # what is downloaded into memory is there only as a loaded model
        with self._lock:
            if self._closed or self._held is not None or self._busy:
                return
            if load:
                self._begin(lambda: self._load(choice))
            elif not choice.here:
                self._begin(lambda: self._download(choice))
        if load:
            # In this thread, beside the file's check in the other one: the load in C begins as soon as both are done,
            # and whatever the caller imports next no longer takes turns with it.
            self._loader.import_bindings()

    async def lease(self, deadline: float | None = None) -> Lease:
        """The engine, loading it first if need be. Waits at most until `deadline` (monotonic).

        Raises ModelUnavailable: nothing configured, the load failed (the reason in our words), or no time left (with
        Retry-After). A load that failed is tried again by a later call, not by every call.
        """
        while True:
            lease, work = self._lease_or_work()
            if lease is not None:
                return lease
            assert work is not None
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._awaited = True
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work)), timeout)
            except TimeoutError:
                raise self._still_loading() from None

    async def wait_ready(self, seconds: float) -> HostState:
        """Start the load if there is something to load, and return when it is ready, failed or the time is up."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ApiError):
            (await self.lease(deadline)).release()
        # Tensors may still be arriving, or a swap be under way: there is no one future for both.
        while self.state().loading is not None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return self.state()

    async def swap(self, reference: str, config: EngineConfig) -> HostState:
        """Load `reference` (a local model) and serve it; running answers finish on the old engine.

        Raises what the store or the engine say of the new model; the old one then still serves.
        """
        await asyncio.to_thread(self._swap, File(reference), config)
        return self.state()

    async def close(self, grace: float) -> None:
        """No new leases; wait up to `grace` seconds for the running ones, then cancel and free."""
        await asyncio.to_thread(self._close, grace)

    # Loading

    def _chosen(self) -> Choice:
        with self._lock:
            if self._choice is None or (not self._choice.here and not self._busy and self._held is None):
                self._choice = choose(self._settings, self._store)
            return self._choice

    def _begin(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` in a thread of its own; call with the lock held."""
        future: Future[None] = Future()
        self._busy, self._work = True, future
        self._error, self._awaited = None, False

        def run() -> None:
            error: ApiError | None = None
            try:
                work()
            except ApiError as failure:
                error = failure
                log.error("%s", failure.message)
            except Exception:  # a bug or a foreign library's surprise: the waiters must not wait for ever
                error = ModelUnavailable("The model could not be loaded; the log has the reason.")
                log.exception("the load failed")
            with self._lock:
                self._busy, self._work = False, None
                self._loader.announce(None)
                self._error = error
                self._failed_at = time.monotonic()
                self._lock.notify_all()
            if not future.done():
                future.set_result(None)

        threading.Thread(target=run, name="load", daemon=True).start()
        return future

    def _lease_or_work(self) -> tuple[Lease | None, Future[None] | None]:
        choice = self._chosen()
        with self._lock:
            if self._closed:
                raise ModelUnavailable("The server is stopping.", retry_after=1)
            if self._held is not None:
                return self._lender.lend(self._held), None
            if self._work is not None:
                return None, self._work
            if self._error is not None and time.monotonic() - self._failed_at < RETRY_S:
                raise ModelUnavailable(self._error.message)
            if choice.reference is None:
                raise ModelUnavailable(choice.error or _NOTHING, retry_after=None)
            return None, self._begin(lambda: self._load(choice))

    def _still_loading(self) -> ModelUnavailable:
        loading = self._loader.progress()
        share = "" if loading is None or loading.percent is None else f" ({loading.percent} %)"
        return ModelUnavailable(f"The model is still loading{share}; try again.", retry_after=2)

    def _download(self, choice: Choice) -> None:
        self._loader.download(choice)
        with self._lock:
            self._choice = None  # to be looked up again: it is here now

    def _load(self, choice: Choice) -> None:
        assert choice.reference is not None
        file = self._loader.open(choice)
        held = self._loader.load(file, choice.reference, config_of(self._settings))
        with self._lock:
            self._choice = replace(choice, here=True, path=str(file.path))
            if self._closed:
                self._lender.retire(held)
                return
            self._held = held
            work = self._work
            lease = None if self._awaited else self._lender.lend(held)
        if work is not None:
            work.set_result(None)  # whoever waits may lease it now: templates and tokens need no weights
        if lease is not None:
            held.engine.warm()
            lease.release()
        try:
            self._loader.wait_arrival(file)
        except ApiError:
            with self._lock:
                if self._held is held:
                    self._held = None
            self._lender.retire(held)
            raise

    # Swapping and freeing

    def _swap(self, reference: File, config: EngineConfig) -> None:
        """One swap at a time; a load under way is waited for."""
        with self._swapping:
            with self._lock:
                while self._busy:
                    self._lock.wait()
                if self._closed:
                    raise ModelUnavailable("The server is stopping.", retry_after=1)
                old = self._held
            file = self._store.open(reference)
            try:
                if old is None or self._room_for(file, config):
                    self._swap_beside(file, reference, config)
                else:
                    self._swap_in_place(old, file, reference, config)
            finally:
                self._loader.announce(None)

    def _room_for(self, file: ModelFile, config: EngineConfig) -> bool:
        need = int(file.size_bytes * 1.1) + config.n_ctx * KV_BYTES_PER_TOKEN
        free = free_memory()
        if free and need > free:
            log.info("no room for two models (%s needed, %s free)", megabytes(need), megabytes(free))
            return False
        return True

    def _swap_beside(self, file: ModelFile, reference: File, config: EngineConfig) -> None:
        """Load the new model while the old one serves, then change over."""
        held = self._loader.load(file, reference, config)
        with self._lock:
            old, self._held = self._held, held
            self._error = None
        if old is not None:
            self._lender.retire(old)

    def _swap_in_place(self, old: Loaded, file: ModelFile, reference: File, config: EngineConfig) -> None:
        """Free the old model first: its answers finish, new ones wait. If the new one fails, the old one returns."""
        future: Future[None] = Future()
        held: Loaded | None = None
        with self._lock:
            self._busy, self._work, self._held = True, future, None
        self._loader.announce(Loading("swap", file.name))
        try:
            self._lender.retire(old)
            self._lender.wait_freed(old)
            try:
                held = self._loader.load(file, reference, config)
            except ApiError:
                log.warning("the new model failed; loading the old one again")
                held = self._loader.load(self._store.open(old.reference), old.reference, old.config)
                raise
        finally:
            with self._lock:
                self._busy, self._held, self._work = False, held, None
                self._lock.notify_all()
            future.set_result(None)

    def _close(self, grace: float) -> None:
        with self._lock:
            self._closed = True
            self._loader.cancel()
            held, self._held = self._held, None
        if held is not None:
            self._lender.retire(held)
        self._lender.close(grace)


_NOTHING = (
    "No model is configured: set MODEL_PATH, or AUTO_REPO_ID and AUTO_FILENAME; "
    "or POST /load to download one, then POST /reload with its path."
)
