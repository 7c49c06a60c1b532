"""Download, open and load the selected model, and record the time and progress of each step."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

from core.engine.interface import Embedder, Engine, EngineConfig
from core.errors import ApiError
from core.lending import E, Loaded
from core.selection import Selection
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import File, Reference
from core.store.store import Store
from core.timeline import Timeline

logger = logging.getLogger("slm.loader")

LoadEngine = Callable[[ModelFile, EngineConfig, Callable[[float], None]], E]


@dataclass(frozen=True, slots=True)
class Loading:
    """A running load, with `done` of `total` bytes. While the size is unknown, both are 0."""

    phase: str  # "download", "load" or "swap"
    model: str
    done: int = 0
    total: int = 0

    @property
    def percent(self) -> int | None:
        return None if self.total == 0 else min(100, self.done * 100 // self.total)


def load_llama(file: ModelFile, config: EngineConfig, progress: Callable[[float], None]) -> Engine:
    """Load with llama.cpp, which is imported here because nothing else needs it."""
    from core.engine.llama import Llama

    return Llama(file, config, progress)


def load_embedder(file: ModelFile, config: EngineConfig, progress: Callable[[float], None]) -> Embedder:
    """Load an embedding model with llama.cpp."""
    from core.engine.embedding import LlamaEmbedder

    return LlamaEmbedder(file, config, progress)


class Loader(Generic[E]):
    """Its methods block. Use it from one thread at a time; any thread may read `loading` and `arriving` or `cancel`."""

    def __init__(self, settings: Settings, store: Store, timeline: Timeline, load_engine: LoadEngine[E]) -> None:
        self._settings = settings
        self._store = store
        self._timeline = timeline
        self._load_engine = load_engine
        self._cancelled = False
        self.loading: Loading | None = None  # the load under way
        self.arriving: ModelFile | None = None  # a model in use whose tensors are still being downloaded

    def announce(self, loading: Loading | None) -> None:
        self.loading = loading

    def cancel(self) -> None:
        """Cancel a running download. A load inside llama.cpp cannot be cancelled."""
        self._cancelled = True

    def import_bindings(self) -> None:
        """Import llama.cpp ahead of `load`. Import errors are ignored here; `load` raises them."""
        from core.engine import native

        with self._timeline.phase("import llama.cpp"), contextlib.suppress(ImportError, OSError, RuntimeError):
            native.bindings()

    def download(self, selection: Selection) -> None:
        """Download the model to this machine. Raises what the store raises."""
        assert selection.reference is not None
        assert not isinstance(selection.reference, File)
        with self._timeline.phase("download"):
            self._store.fetch(
                selection.reference,
                refresh=False,
                progress=self._download_progress(selection),
                cancelled=self._stopping,
            )

    def open(self, selection: Selection) -> ModelFile:
        """Return the selected model as a file, downloading it first if necessary. Raises what the store raises."""
        assert selection.reference is not None
        if not selection.is_local:
            # Importing the bindings takes about as long as receiving the first bytes, so do both at once.
            threading.Thread(target=self.import_bindings, name="import", daemon=True).start()
        try:
            with self._timeline.phase("open"):
                return self._store.open(
                    selection.reference, progress=self._download_progress(selection), cancelled=self._stopping
                )
        except ApiError:
            logger.error("%s cannot be opened", selection.reference)  # clients see the error, so it has no folders
            raise

    def load(self, file: ModelFile, reference: Reference, config: EngineConfig) -> Loaded[E]:
        """Load the file into an engine. If that fails, release the file and raise the engine's error."""
        opened = file

        def report(share: float) -> None:
            if file.arrival is None:
                self.announce(Loading("load", file.name, int(share * file.size_bytes), file.size_bytes))

        try:
            if file.arrival is not None and self._reads_weights(config):
                self.arriving = file
                self.wait_arrival()
                file = replace(file, arrival=None)
            self.announce(Loading("load", file.name, 0, file.size_bytes))
            with self._timeline.phase("load"):
                engine = self._load_engine(file, config, report)
        except BaseException:
            opened.discard()
            raise
        logger.info("%s is loaded: %s", file.name, engine.card.description)
        self.arriving = file if file.arrival is not None else None
        return Loaded(engine, reference, config)

    def wait_arrival(self) -> None:
        """Block until the tensors of the latest model are downloaded. Raises ModelUnavailable if that fails."""
        arriving = self.arriving
        if arriving is None or arriving.arrival is None:
            return
        try:
            with self._timeline.phase("tensors arrive"):
                arriving.arrival.wait()
        finally:
            self.arriving = None

    def _reads_weights(self, config: EngineConfig) -> bool:
        """Return whether llama.cpp reads tensors at load, so that they must be complete by then.

        It does to repack them, and to copy layers to a GPU (llama-model-loader.cpp, load_all_data). From a mapping that
        is still being filled it would copy zeros.
        """
        if self._settings.repack == "on":
            return True
        if config.n_gpu_layers == 0:
            return False
        from core.engine import native

        return bool(native.bindings().llama_supports_gpu_offload())

    def _download_progress(self, selection: Selection) -> Callable[[int, int], None]:
        name = selection.name or ""
        return lambda done, total: self.announce(Loading("download", name, done, total))

    def _stopping(self) -> bool:
        return self._cancelled
