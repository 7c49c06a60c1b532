"""Define a model as llama.cpp opens it, perhaps while its tensors are still being downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Arrival(Protocol):
    """The background download of a model's remaining bytes."""

    def wait(self) -> None:
        """Block until every byte is received and verified. Raise ModelUnavailable if that failed."""

    def progress(self) -> tuple[int, int]:
        """Return (bytes received, bytes in total)."""
        ...

    def cancel(self) -> None:
        """Stop the download; `wait` then raises."""


def _keep() -> None:
    return None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """`path` is what llama.cpp opens: a file (the first of a split model) or /proc/self/fd/N.

    With `arrival` set, header and vocabulary are verified but tensors may be missing: load without repacking and call
    `arrival.wait()` before the first decode. Call `release()` when the model is freed; it closes the memfd.
    """

    name: str  # what clients call the model: the file's name without .gguf
    path: Path
    size_bytes: int
    source: str  # where its bytes came from: "huggingface", "s3" or "file" (unknown)
    sha256: str | None = None
    commit: str | None = None
    arrival: Arrival | None = None
    release: Callable[[], None] = _keep

    @property
    def in_memory(self) -> bool:
        """Whether `path` is a memfd's. Its bytes take up memory; those of a file are cached and can be dropped."""
        return str(self.path).startswith("/proc/self/fd/")

    def discard(self) -> None:
        """Release a file that will not be loaded."""
        if self.arrival is not None:
            self.arrival.cancel()
        self.release()
