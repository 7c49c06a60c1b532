"""Loader: from a selection to an engine, with every step's time and progress. Knows nothing of who uses the engine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.engine.interface import Engine, EngineConfig
from core.errors import ApiError
from core.lending import Loaded
from core.selection import Selection
from core.settings import Settings
from core.store.model_file import ModelFile
from core.store.reference import File, Reference
from core.store.store import Store
from core.timeline import Timeline

log = logging.getLogger("slm.loader")

LoadEngine = Callable[[ModelFile, EngineConfig, Callable[[float], None]], Engine]


@dataclass(frozen=True, slots=True)
class Loading:
    """A load under way: phase is "download", "load" or "swap"; `done` of `total` bytes (0 of 0: not known yet)."""

    phase: str
    model: str
    done: int = 0
    total: int = 0

    @property
    def percent(self) -> int | None:
        return None if self.total == 0 else min(100, self.done * 100 // self.total)


def load_llama(file: ModelFile, config: EngineConfig, progress: Callable[[float], None]) -> Engine:
    """Load with llama.cpp. The import is part of the load: nothing else needs it."""
    from core.engine.llama import Llama

    return Llama(file, config, progress)


class Loader:
    """Blocks, and is used by one thread at a time. Any thread may read `loading` and `arriving`, and call `cancel`."""

    def __init__(self, settings: Settings, store: Store, timeline: Timeline, load_engine: LoadEngine) -> None:
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
        """Give up a download; what is in llama.cpp's hands goes on."""
        self._cancelled = True

    def import_bindings(self) -> None:
        """Import llama.cpp now rather than in `load`. What is wrong with it is for `load` to say."""
        from core.engine import native

        with self._timeline.phase("import llama.cpp"), contextlib.suppress(ImportError, OSError, RuntimeError):
            native.bindings()

    def download(self, selection: Selection) -> None:
        """Bring the model to this machine. Raises what the store raises."""
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
        """The model's bytes, downloaded if need be. Raises what the store raises."""
        assert selection.reference is not None
        if not selection.is_local:
            # The bindings' import and the first bytes' way over the network take the same time: do both at once.
            threading.Thread(target=self.import_bindings, name="import", daemon=True).start()
        try:
            with self._timeline.phase("open"):
                return self._store.open(
                    selection.reference, progress=self._download_progress(selection), cancelled=self._stopping
                )
        except ApiError:
            log.error("%s cannot be opened", selection.reference)  # clients see the error, so it has no folders
            raise

    def load(self, file: ModelFile, reference: Reference, config: EngineConfig) -> Loaded:
        """Turn a file into an engine; the file is released if that fails. Raises what the engine raises."""
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
        log.info("%s is loaded: %s", file.name, engine.card.description)
        self.arriving = file if file.arrival is not None else None
        return Loaded(engine, reference, config)

    def wait_arrival(self) -> None:
        """Block until the tensors of the model loaded last are there. Raises ModelUnavailable if they do not come."""
        arriving = self.arriving
        if arriving is None or arriving.arrival is None:
            return
        try:
            with self._timeline.phase("tensors arrive"):
                arriving.arrival.wait()
        finally:
            self.arriving = None

    def _reads_weights(self, config: EngineConfig) -> bool:
        """Whether llama.cpp reads tensors at load: to repack them, or to copy layers to a GPU, which it does from the
        mapping and would do with the zeros of a model that is still arriving (llama-model-loader.cpp, load_all_data).
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
