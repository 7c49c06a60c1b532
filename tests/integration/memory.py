"""Check models in memory, which have paths such as `/proc/self/fd/N`."""

import os
from pathlib import Path


def is_open(path: Path, memory: os.stat_result) -> bool:
    """Return whether `path` still refers to `memory`. Another thread may reuse the same descriptor."""
    try:
        return os.path.samestat(path.stat(), memory)
    except FileNotFoundError:
        return False
