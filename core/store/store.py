"""Store: the one way in for models. Everything lands through it, whole and verified, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import ModelNotFound
from core.store import sidecar
from core.store.directory import Directory, LocalModel, parts
from core.store.model_file import ModelFile
from core.store.reference import S3, File, HuggingFace, Reference, model_name
from core.store.source import Cancelled, Mirror, Progress, Source

__all__ = ["Cancelled", "Fetched", "LocalModel", "Progress", "Store"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `fetch` did. `path` is the (first) file in MODELS_DIR."""

    status: Literal["downloaded", "present"]
    path: Path
    size_bytes: int
    sha256: str
    source: str  # "huggingface", "s3" or "file"
    commit: str | None = None


class Store:
    """All methods block (disk, network) and are called in worker threads; all are thread-safe.

    `sources` are asked in order; `mirror` is offered what the hub delivered; `allowed` are files beyond `models_dir`
    that may be served (configured, embedded, baked). `prefer_memory` is what target "auto" does where both have room.
    """

    def __init__(
        self,
        models_dir: Path,
        sources: tuple[Source, ...] = (),
        mirror: Mirror | None = None,
        allowed: tuple[Path, ...] = (),
        target: Literal["auto", "disk", "memory"] = "auto",
        prefer_memory: bool = False,
    ) -> None:
        self._directory = Directory(models_dir, allowed)
        self._sources = sources
        self._mirror = mirror
        self._target = target
        self._prefer_memory = prefer_memory

    def list(self) -> tuple[LocalModel, ...]:
        """Every model under MODELS_DIR, subfolders and split files understood, sorted by name."""
        return self._directory.list()

    def locate(self, path: str) -> Path:
        """The local model that a client names: in MODELS_DIR (symlinks resolved), or an allowed one.

        Raises InvalidRequest (outside, not a GGUF, truncated) or ModelNotFound (with the names that exist).
        """
        return self._directory.locate(path)

    def present(self, reference: Reference) -> Path | None:
        """Where the model lies on this machine, None if it would have to be downloaded. No network.

        Raises InvalidRequest if a local file is named that may not be served or is damaged.
        """
        if isinstance(reference, File):
            try:
                return self.locate(reference.path)
            except ModelNotFound:
                return None
        raise NotImplementedError

    def fetch(
        self,
        reference: HuggingFace | S3,
        *,
        sha256: str | None = None,
        refresh: bool = True,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Fetched:
        """Bring a model into MODELS_DIR, from the first source that has it. `refresh`: ask what a branch means now.

        Raises InvalidRequest (no such repository, file or revision; wrong sha256; not a GGUF) or ModelUnavailable
        (network, disk space), each saying what to do.
        """
        raise NotImplementedError

    def open(
        self, reference: Reference, *, progress: Progress | None = None, cancelled: Cancelled | None = None
    ) -> ModelFile:
        """What llama.cpp can open now: a local file at once, else downloaded to MODEL_TARGET, perhaps arriving yet."""
        if isinstance(reference, File):
            return self._local(reference, self.locate(reference.path))
        raise NotImplementedError

    def _local(self, reference: Reference, path: Path) -> ModelFile:
        known = sidecar.read(path)
        return ModelFile(
            name=model_name(path.name),
            path=path,
            size_bytes=sum(part.stat().st_size for part in parts(path)),
            reference=str(reference),
            source=known.source if known else "file",
            sha256=known.sha256 if known else None,
            commit=known.commit if known else None,
        )
