"""ModelFile: a model's bytes as llama.cpp opens them, perhaps with the tensors still on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Arrival(Protocol):
    """The rest of a model that is still being downloaded."""

    def wait(self) -> None:
        """Block until every byte is there and verified. Raises ModelUnavailable if that failed."""

    def progress(self) -> tuple[int, int]:
        """(bytes arrived, bytes in all)."""
        ...

    def cancel(self) -> None:
        """Give up; `wait` then raises."""


def _keep() -> None:
    return None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """`path` is what llama.cpp opens: a file (the first of a split model) or /proc/self/fd/N.

    With `arrival` set, header and vocabulary are there and verified, the tensors may not be: load with repacking off
    and call `arrival.wait()` before the first decode. `release()` gives back what holds the bytes (a memfd); call it
    when the model is freed.
    """

    name: str  # what clients call the model: the file's name without .gguf
    path: Path
    size_bytes: int
    reference: str  # as it was asked for
    source: str  # "file", "memory", "huggingface", "s3", "embedded"
    sha256: str | None = None
    commit: str | None = None
    arrival: Arrival | None = None
    release: Callable[[], None] = _keep

    def discard(self) -> None:
        """Give back a file that will not be loaded."""
        if self.arrival is not None:
            self.arrival.cancel()
        self.release()
