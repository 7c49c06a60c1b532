"""Define the protocols of the places that models come from (Source) and are copied to (Mirror).

A source resolves a reference to the files of one model, then downloads a file into a `Partial`: an open temporary file
of the store. The store does the rest: disk space, locks, the sha256 of the whole, the GGUF check, publishing, cleanup.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace

Progress = Callable[[int, int], None]  # (bytes done, bytes in total; 0 if unknown)
Cancelled = Callable[[], bool]


def never() -> bool:
    """A `Cancelled` of work that cannot be cancelled."""
    return False


class DownloadCancelled(ModelUnavailable):
    """The download was cancelled. Received bytes stay for the next try."""

    def __init__(self, message: str = "The download was cancelled. The next one resumes it.") -> None:
        super().__init__(message, retry_after=None)


class Damaged(ModelUnavailable):
    """A source holds wrong bytes. Another request would return the same ones."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model. `path` is its name at the source, with folders; the source claims size and sha256."""

    path: str
    size_bytes: int
    sha256: str | None = None
    etag: str | None = None  # tells versions apart where there is no sha256


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model at a source: its files, all of one commit, the parts of a split model in order."""

    source: str  # "huggingface" or "s3"
    reference: HuggingFace | S3  # as requested; its revision may be a branch
    files: tuple[RemoteFile, ...]
    commit: str | None = None
    resolved_at: float = 0.0  # when Hugging Face named the commit (Unix time); 0: it was not asked

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Partial(Protocol):
    """A file that is being downloaded: `size` bytes, of which the first `done` were received by an earlier try.

    Write with `os.pwrite(partial.fd, ...)`, from any thread and in any order. `landed(n)` records that the first n
    bytes are written. A later try resumes there, so call it as the contiguous prefix grows (every few MiB).
    `landed(0)` starts over.
    """

    fd: int
    size: int
    done: int

    def landed(self, offset: int) -> None: ...


class Source(Protocol):
    """A place that models come from. Blocking and thread-safe.

    `resolve` returns None if the source does not have the model; the store then asks the next one. The authority raises
    InvalidRequest if the model does not exist. All methods raise ModelUnavailable if the source cannot answer or a
    download fails, and DownloadCancelled.
    """

    name: str
    authority: bool  # True for Hugging Face: it knows the commit of a branch, and its "no" is final

    def resolve(
        self, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled = never
    ) -> RemoteModel | None:
        """Return the model's files, or None. Without `refresh`, a cached commit of a branch will do."""
        ...

    def download(
        self, remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """Fill `partial` from `partial.done` on. `progress` counts this file's bytes, including `partial.done`.

        Return whether the sha256 of the whole was computed from the bytes and equals `file.sha256`. Digests of blocks
        are not enough: they come from the same place as the bytes.
        """
        ...

    def open_memory(
        self, remote: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """Download a model of one file into a memfd and verify it: size, sha256, GGUF header.

        `arrival` may be set on the result. Return None if this source cannot verify it in memory; the store then uses
        the disk. If `remote.reference` pins a sha256, it is computed from the bytes before `arrival.wait` returns.
        """
        ...


class Mirror(Protocol):
    """A copy of the models that Hugging Face delivered."""

    def offer(self, reference: HuggingFace, remote: RemoteModel, paths: tuple[Path, ...]) -> None:
        """Upload the model once, in the background, and record the commit of its branch. Return at once, never raise.

        The store calls this after each fetch of a Hugging Face reference, from whichever source. `paths` are the
        published files.
        """
        ...

    def distrust(self, remote: RemoteModel) -> None:
        """Replace the mirror's copy of `remote` at the next offer, because its bytes were wrong. Never raise."""
        ...

    def run_pending(self, deadline: float | None) -> bool:
        """Upload what was offered until `deadline` (monotonic clock), where nothing runs in the background (Lambda).

        Return True if nothing is left to do. Never raise.
        """
        ...
