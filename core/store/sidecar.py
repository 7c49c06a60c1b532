"""Sidecar: `<file>.json` beside a model file, which says where the file came from and what its sha256 is.

It speaks for the file only while size and modification time are what they were at publishing: a sidecar whose file was
replaced by hand is ignored, never believed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Sidecar:
    origin: str  # hf://org/repo/file.gguf or s3://bucket/key.gguf, without a revision
    source: str  # who delivered the bytes: "huggingface" or "s3"
    sha256: str
    size_bytes: int
    mtime_ns: int
    published: str  # UTC, ISO 8601
    revision: str | None = None  # as asked
    commit: str | None = None

    def names(self, revision: str) -> bool:
        """Whether the file is what `revision` (a branch, tag, commit or the start of one) named when it was fetched."""
        if revision == self.revision:
            return True
        return self.commit is not None and len(revision) >= 7 and self.commit.startswith(revision)


def path_of(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def read(file: Path) -> Sidecar | None:
    """The sidecar of `file`, None if there is none or if it speaks of another file."""
    known = peek(file)
    try:
        stat = file.stat()
    except OSError:
        return None
    if known is None or known.size_bytes != stat.st_size or not _same_time(known.mtime_ns, stat.st_mtime_ns):
        return None
    return known


def peek(file: Path) -> Sidecar | None:
    """The sidecar of `file` as it stands, true or not: says whose place this is after an end between two renames."""
    try:
        found = json.loads(path_of(file).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    known: dict[str, Any] = {field.name: found.get(field.name) for field in fields(Sidecar)}
    texts = (known[name] for name in ("origin", "source", "sha256", "published"))
    numbers = (known[name] for name in ("size_bytes", "mtime_ns"))
    if not all(isinstance(value, str) for value in texts) or not all(isinstance(value, int) for value in numbers):
        return None
    return Sidecar(**known)


def write(file: Path, sidecar: Sidecar) -> None:
    """Put it beside `file`, whole or not at all, and tidy up after writers that were killed. Raises OSError."""
    path = path_of(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    text = json.dumps(asdict(sidecar), indent=2) + "\n"
    for last in (False, False, True):
        try:
            temporary.write_text(text)
            temporary.replace(path)
            break
        except FileNotFoundError:  # another writer took it for a dead one's and tidied it away
            if last:
                raise
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        stray.unlink(missing_ok=True)


def _same_time(recorded: int, found: int) -> bool:
    # Image layers and archives keep whole seconds only.
    return recorded == found or (found % _SECOND == 0 and recorded // _SECOND == found // _SECOND)
