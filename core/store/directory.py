"""List the models on this machine, and check the paths that clients name. No network."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidRequest, ModelNotFound
from core.store import gguf, sidecar, versions
from core.store.reference import quote_path, split_part
from core.store.versions import current, parts, place_of

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in MODELS_DIR: a .gguf file, or the first part of a split one with `size_bytes` of all its parts."""

    name: str  # path relative to MODELS_DIR
    path: Path
    size_bytes: int


class Directory:
    """MODELS_DIR and the few files outside it that may be served. Thread-safe and read-only."""

    def __init__(self, root: Path, allowed: tuple[Path, ...] = (), *, generates: bool = True) -> None:
        self.root = root
        self._generates = generates  # whether models must be able to generate text
        self._allowed = allowed
        self._lock = threading.Lock()
        self._checked: dict[Path, tuple[int, int, int]] = {}  # file: (inode, size, mtime) of a valid header

    def list(self) -> tuple[LocalModel, ...]:
        """Return every complete model, by name. Hidden files and folders are skipped."""
        models = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and not versions.holds(name))
            for file in files:
                if file.startswith(".") or not file.lower().endswith(".gguf") or _UNUSABLE.search(file):
                    continue
                if (split_part(file) or (1, 1))[0] != 1:
                    continue
                path = Path(folder, file)
                if self._served_as(path) is None:
                    continue
                try:
                    size = sum(part.stat().st_size for part in parts(current(path)))
                except (OSError, InvalidRequest):
                    continue  # a part is missing, or the file has just gone
                models.append(LocalModel(path.relative_to(self.root).as_posix(), path, size))
        return tuple(sorted(models, key=lambda model: model.name))

    def locate(self, name: str) -> Path:
        """Return the (first) file of the model that a client names, with a valid header.

        Raise InvalidRequest (outside MODELS_DIR, not a GGUF, truncated) or ModelNotFound (with the existing names).
        """
        if not name or len(name) > 4096 or _UNUSABLE.search(name):
            raise InvalidRequest("A model is named by a path without control characters.", param="model_path")
        path = self._resolve(str(place_of(Path(name))))
        if not name.lower().endswith(".gguf"):
            raise InvalidRequest(f"Models are .gguf files, got {quote_path(name)}.", param="model_path")
        first = current(parts(path)[0])
        if not is_file(path) and not is_file(first):
            raise ModelNotFound(f"There is no model {quote_path(name)}. {self._names()}", param="model_path")
        self.check(first, name)
        return first

    def check(self, path: Path, name: str) -> None:
        """Raise InvalidRequest unless every part of the model at `path` exists and has a valid header.

        A header is read once for each version of a file, and not at all if a sidecar says that it was published here.
        """
        for part in parts(path):
            try:
                stat = part.stat()
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                with self._lock:
                    if self._checked.get(part) == seen:
                        continue
                if sidecar.read(path) is None:
                    header = gguf.read_header(part)
                    if self._generates:
                        gguf.check_generates(header)
            except FileNotFoundError:
                raise InvalidRequest(
                    f"{quote_path(name)} is a split model, and {part.name!r} is missing. POST /load downloads all "
                    "parts.",
                    param="model_path",
                ) from None
            except (gguf.MalformedGGUF, OSError) as error:
                reason = error if isinstance(error, gguf.MalformedGGUF) else "cannot be read by this process"
                raise InvalidRequest(
                    f"{part.name!r} {reason}. Replace the file, or download it with POST /load.", param="model_path"
                ) from error
            with self._lock:
                self._checked[part] = seen

    def _resolve(self, name: str) -> Path:
        """Return the real path of `name` in MODELS_DIR, or the allowed path that it equals."""
        candidates = [Path(name)] if Path(name).is_absolute() else [self.root / name, Path(name)]
        allowed = [path for path in (self._served_as(candidate) for candidate in candidates) if path is not None]
        if not allowed:
            raise InvalidRequest(
                f"{quote_path(name)} is outside MODELS_DIR; use a name from GET /models.", param="model_path"
            )
        return next((path for path in allowed if is_file(path) or is_file(current(parts(path)[0]))), allowed[0])

    def _served_as(self, path: Path) -> Path | None:
        """Return the file to open, or None if it may not be served. Links are resolved each time: mounts come late."""
        real = real_path(path)
        if real.is_relative_to(real_path(self.root)):
            return real
        for allowed in self._allowed:
            for part in parts(allowed):  # may be a link into a Hugging Face cache, whose name matters
                if real_path(part) == real:
                    return part.absolute()
        return None

    def _names(self) -> str:
        names = [model.name for model in self.list()]
        if not names:
            return "MODELS_DIR is empty; POST /load downloads one."
        return f"There are: {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}."


def real_path(path: Path) -> Path:
    """Return `path` with its links resolved as far as possible. `Path.resolve` raises on a loop of links."""
    return Path(os.path.realpath(path))


def is_file(path: Path) -> bool:
    """Return whether it is a file. `Path.is_file` raises for a name of 300 bytes; this returns False."""
    try:
        return path.is_file()
    except OSError:
        return False
