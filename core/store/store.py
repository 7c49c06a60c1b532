"""Store: the one way in for models. Everything lands through it, whole and verified, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace, Reference

Progress = Callable[[int, int], None]  # (bytes done, bytes in all; 0 when unknown)
Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in MODELS_DIR: a .gguf file, or the first part of a split one with `size_bytes` of all its parts."""

    name: str  # path relative to MODELS_DIR
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `fetch` did. `path` is the (first) file in MODELS_DIR."""

    status: Literal["downloaded", "present"]
    path: Path
    size_bytes: int
    sha256: str
    source: str  # "huggingface", "s3" or "file"
    commit: str | None = None


class Source(Protocol):
    """A place models come from (an adapter): says whether it has one, and brings it."""

    name: str

    def has(self, reference: Reference) -> bool: ...


class Store:
    """All methods block (disk, network) and are called in worker threads; all are thread-safe."""

    def list(self) -> tuple[LocalModel, ...]:
        """Every model under MODELS_DIR, subfolders and split files understood, sorted by name."""
        raise NotImplementedError

    def locate(self, path: str) -> Path:
        """The local model that a client names: in MODELS_DIR (symlinks resolved), or the configured, embedded or baked one.

        Raises InvalidRequest (outside, not a GGUF, truncated) or ModelNotFound (with the names that exist).
        """
        raise NotImplementedError

    def present(self, reference: Reference) -> Path | None:
        """Where the model lies on this machine, None if it would have to be downloaded. No network."""
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
        """Bring a model into MODELS_DIR, from the first source that has it. `refresh` asks the hub what a branch means now.

        Raises InvalidRequest (no such repository, file or revision; wrong sha256; not a GGUF) or ModelUnavailable
        (network, disk space), each saying what to do.
        """
        raise NotImplementedError

    def open(
        self, reference: Reference, *, progress: Progress | None = None, cancelled: Cancelled | None = None
    ) -> ModelFile:
        """What llama.cpp can open now: a local file at once, else downloaded to MODEL_TARGET, perhaps still arriving."""
        raise NotImplementedError
