"""Sidecar: `<file>.json` beside a model file, which says where the model came from and what its sha256 is.

It speaks for the files only while their sizes and modification times are what they were at publishing: a sidecar whose
file was replaced by hand is ignored, never believed. A split model has one, beside its first file, for all its files.
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

from core.store.reference import split_files

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """A further file of a split model."""

    sha256: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Sidecar:
    origin: str  # hf://org/repo/file.gguf or s3://bucket/key.gguf, without a revision; a split model's first file
    source: str  # who delivered the bytes: "huggingface" or "s3"
    sha256: str  # these three are of the first file
    size_bytes: int
    mtime_ns: int
    published: str  # UTC, ISO 8601
    revision: str | None = None  # as asked
    commit: str | None = None
    parts: tuple[Part, ...] = ()  # the other files of a split model, in order

    @property
    def digests(self) -> tuple[str, ...]:
        """The sha256 of each file."""
        return (self.sha256, *(part.sha256 for part in self.parts))

    @property
    def total_bytes(self) -> int:
        return self.size_bytes + sum(part.size_bytes for part in self.parts)

    def names(self, revision: str) -> bool:
        """Whether the file is what `revision` (a branch, tag, commit or the start of one) named when it was fetched."""
        if revision == self.revision:
            return True
        return self.commit is not None and len(revision) >= 7 and self.commit.startswith(revision)


def path_of(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def read(file: Path) -> Sidecar | None:
    """The sidecar of a model by its first file; None if there is none, or if any file is another one than it says."""
    described = peek(file)
    if described is None:
        return None
    names = split_files(file.name)
    whole: tuple[Sidecar | Part, ...] = (described, *described.parts)
    if len(names) != len(whole):
        return None
    for name, part in zip(names, whole, strict=True):
        try:
            stat = file.with_name(name).stat()
        except OSError:
            return None
        if part.size_bytes != stat.st_size or not _same_time(part.mtime_ns, stat.st_mtime_ns):
            return None
    return described


def peek(file: Path) -> Sidecar | None:
    """The sidecar of `file` as it stands, true or not: says whose place this is after an end between two renames."""
    try:
        found = json.loads(path_of(file).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    try:
        parts = tuple(Part(**part) for part in found.get("parts", ()))
    except TypeError:
        return None
    known: dict[str, Any] = {field.name: found.get(field.name) for field in fields(Sidecar)} | {"parts": parts}
    texts = [known[name] for name in ("origin", "source", "sha256", "published")] + [part.sha256 for part in parts]
    numbers = [known["size_bytes"], known["mtime_ns"]]
    numbers += [number for part in parts for number in (part.size_bytes, part.mtime_ns)]
    if not all(isinstance(value, str) for value in texts) or not all(isinstance(value, int) for value in numbers):
        return None
    return Sidecar(**known)


def write(file: Path, sidecar: Sidecar) -> None:
    """Put it beside `file`, whole or not at all, and remove what killed writers left. Raises OSError."""
    path = path_of(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    text = (json.dumps(asdict(sidecar), indent=2) + "\n").encode()
    for last in (False, False, True):
        try:
            _write(temporary, text)
            temporary.replace(path)
            break
        except FileNotFoundError:  # another writer removed it as a leftover
            if last:
                raise
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        stray.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """A new file, on the disk. The name can be guessed: a link that lies in wait there is not followed."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_time(recorded: int, found: int) -> bool:
    # Image layers and archives keep whole seconds only.
    return recorded == found or (found % _SECOND == 0 and recorded // _SECOND == found // _SECOND)
