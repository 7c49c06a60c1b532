"""Source and Mirror: what the store asks of the places that models come from and go to.

A source resolves a reference to the files of one model, then brings a file into a `Partial`: an open temporary file of
the store. The store owns the rest: space, locks, the whole sha256, the GGUF check, publishing, cleaning up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace

Progress = Callable[[int, int], None]  # (bytes done, bytes in all; 0 when unknown)
Cancelled = Callable[[], bool]


class DownloadCancelled(ModelUnavailable):
    """`cancelled()` said so. What has arrived stays for the next try."""

    def __init__(self, message: str = "The download was cancelled; what has arrived is kept for the next try.") -> None:
        super().__init__(message, retry_after=None)


class Damaged(ModelUnavailable):
    """A source holds bytes that are not what they should be. Asking it again brings the same bytes."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model. `path` is its name there (folders included); size and sha256 are the source's word."""

    path: str
    size_bytes: int
    sha256: str | None = None
    etag: str | None = None  # tells versions apart where there is no sha256


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model that a source has: its files (those of a split model in order), all of one commit."""

    source: str  # "huggingface" or "s3"
    reference: HuggingFace | S3  # as asked, its revision perhaps a branch
    files: tuple[RemoteFile, ...]
    commit: str | None = None
    resolved_at: float = 0.0  # when the hub said so, in seconds since 1970; 0: it was not asked

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Partial(Protocol):
    """A file of the store being filled: `size` bytes, of which the first `done` are there from an earlier try.

    Write with `os.pwrite(partial.fd, ...)`, from any thread and in any order. `landed(n)` says that the first n bytes
    are written: it is what a later try resumes from, so call it as the gapless front moves on (every part or few MiB).
    `landed(0)` starts over.
    """

    fd: int
    size: int
    done: int

    def landed(self, offset: int) -> None: ...


class Source(Protocol):
    """A place models come from. Blocking, thread-safe.

    Errors: `resolve` returns None for "not here" (the next source is asked) or raises InvalidRequest when it is the
    authority and says no; ModelUnavailable when it cannot answer or a download fails; DownloadCancelled.
    """

    name: str
    authority: bool  # True for the hub: it knows what a branch means now, and its "no" is final

    def resolve(self, reference: HuggingFace | S3, *, refresh: bool) -> RemoteModel | None:
        """The model's files, None if it is not here. `refresh` False: a branch may mean what it meant before."""
        ...

    def download(
        self, found: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """Fill `partial` from `partial.done` on. True if the sha256 of the whole was computed on the way and is
        `file.sha256`; digests of blocks are not enough, since they come from the same place as the bytes.

        `progress` counts this file's bytes, `partial.done` included.
        """
        ...

    def open_memory(
        self, found: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """The model in a memfd, verified (size, sha256, GGUF header), perhaps with `arrival` set. None: not possible
        here (split model, no memfd, no room); the store then uses the disk.

        A sha256 in `found.reference` is computed from the bytes, whatever the source says of them: `arrival.wait`
        returns once it is right.
        """
        ...


class Mirror(Protocol):
    """Where models go that the hub delivered."""

    def offer(self, reference: HuggingFace, found: RemoteModel, paths: tuple[Path, ...]) -> None:
        """Upload once, in the background, and note what the branch in `reference` means. Returns at once, never raises.

        Called after each fetch of a hub reference, whichever source brought it; `paths` are the published files.
        """
        ...

    def distrust(self, found: RemoteModel) -> None:
        """Replace what the mirror holds of `found` at the next offer: its bytes were wrong. Never raises."""
        ...

    def run_pending(self, deadline: float | None) -> bool:
        """Where nothing runs in the background (Lambda): work on what was offered until `deadline` on the monotonic
        clock. True: nothing is left to do. Never raises."""
        ...
