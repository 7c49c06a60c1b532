"""Decide whether a model is downloaded to a file or to memory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from core.errors import ModelUnavailable

DISK_MARGIN = 64 << 20  # bytes left free on the disk
MEMORY_MARGIN = 256 << 20  # bytes for the context, the engine and the rest of the process


def free_disk(folder: Path) -> int:
    """Return how many bytes this user may still write where `folder` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int:
    """Return how many bytes can be allocated without swapping, within the cgroup's limit. 0 means unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used + cached))


def has_memfd() -> bool:
    return sys.platform.startswith("linux") and hasattr(os, "memfd_create")


def need_disk(folder: Path, size: int, have: int = 0) -> None:
    """Raise ModelUnavailable unless a file of `size` bytes, `have` of them written, fits on the disk of `folder`."""
    free = free_disk(folder)
    if size - have + DISK_MARGIN > free:
        raise ModelUnavailable(no_room(size, free), retry_after=None)


def need_memory(size: int) -> None:
    """Raise ModelUnavailable if `size` bytes certainly do not fit into memory."""
    free = free_memory()
    if 0 < free < size:
        raise ModelUnavailable(
            f"The model does not fit in memory: it needs {megabytes(size)}, {megabytes(free)} are free. "
            "Give the process more memory, or set MODEL_TARGET=disk.",
            retry_after=None,
        )


def no_room(size: int, free: int) -> str:
    return (
        f"The model does not fit in MODELS_DIR: it needs {megabytes(size)}, {megabytes(free)} are free. "
        "Free some space, set MODELS_DIR to another disk, or set MODEL_TARGET=memory."
    )


def choose(
    target: Literal["auto", "disk", "memory"], folder: Path, size: int, *, prefer_memory: bool
) -> Literal["disk", "memory"]:
    """Return the target of a model of `size` bytes.

    "auto" means memory if the model fits there, and memory is preferred or the disk has no room.
    """
    if target != "auto":
        return target
    if not has_memfd() or size + MEMORY_MARGIN > free_memory():
        return "disk"
    return "memory" if prefer_memory or size + DISK_MARGIN > free_disk(folder) else "disk"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
