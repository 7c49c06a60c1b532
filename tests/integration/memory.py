"""Models in memory, as `/proc/self/fd/N`."""

import os
from pathlib import Path


def is_open(path: Path, memory: os.stat_result) -> bool:
    """Return whether `path` is still `memory`. Another thread may have opened something under the same number."""
    try:
        return os.path.samestat(path.stat(), memory)
    except FileNotFoundError:
        return False
