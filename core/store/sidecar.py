"""Record where a model came from, and its sha256, in `<file>.json` next to the model file.

A sidecar is valid only while sizes and modification times of the files are those at publishing. It is ignored once a
file is replaced by hand. A split model has one sidecar, next to its first file, for all its files.
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
    source: str  # where the bytes were downloaded from: "huggingface" or "s3"
    sha256: str  # these three are of the first file
    size_bytes: int
    mtime_ns: int
    published: str  # UTC, ISO 8601
    revision: str | None = None  # as requested
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
        """Return whether `revision` (branch, tag, commit or its prefix) named this model when it was downloaded."""
        if revision == self.revision:
            return True
        return self.commit is not None and len(revision) >= 7 and self.commit.startswith(revision)


def path_of(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def read(file: Path) -> Sidecar | None:
    """Return the sidecar of a model by its first file, or None if it is missing or a file has changed since."""
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
    """Return the sidecar even if the file has changed. After a crash it still records the place's owner."""
    try:
        record = json.loads(path_of(file).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    try:
        parts = tuple(Part(**part) for part in record.get("parts", ()))
    except TypeError:
        return None
    values: dict[str, Any] = {field.name: record.get(field.name) for field in fields(Sidecar)} | {"parts": parts}
    texts = [values[name] for name in ("origin", "source", "sha256", "published")] + [part.sha256 for part in parts]
    numbers = [values["size_bytes"], values["mtime_ns"]]
    numbers += [number for part in parts for number in (part.size_bytes, part.mtime_ns)]
    if not all(isinstance(value, str) for value in texts) or not all(isinstance(value, int) for value in numbers):
        return None
    return Sidecar(**values)


def write(file: Path, sidecar: Sidecar) -> None:
    """Write it atomically next to `file`, and remove the leftovers of killed writers. Raise OSError."""
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
    """Write a new file and flush it. Its name can be guessed, so a link in its place is not followed."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_time(recorded: int, actual: int) -> bool:
    # Image layers and archives store whole seconds only.
    return recorded == actual or (actual % _SECOND == 0 and recorded // _SECOND == actual // _SECOND)
