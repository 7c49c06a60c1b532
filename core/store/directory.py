"""Directory: the models that lie on this machine, and the guard of the paths that clients name. No network."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidRequest, ModelNotFound
from core.store import gguf, sidecar, versions
from core.store.reference import split_part
from core.store.versions import current, parts, place_of

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in MODELS_DIR: a .gguf file, or the first part of a split one with `size_bytes` of all its parts."""

    name: str  # path relative to MODELS_DIR
    path: Path
    size_bytes: int


class Directory:
    """MODELS_DIR and the few files beyond it that may be served. Thread-safe; reads only."""

    def __init__(self, root: Path, allowed: tuple[Path, ...] = ()) -> None:
        self.root = root
        self._allowed = allowed
        self._lock = threading.Lock()
        self._checked: dict[Path, tuple[int, int, int]] = {}  # file: (inode, size, mtime) when its header was good

    def list(self) -> tuple[LocalModel, ...]:
        """Every model that is whole, by name. Hidden files and folders (the store's own, other tools') are left out."""
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
        """The (first) file of the model that a client names, its header checked.

        Raises InvalidRequest (outside, not a GGUF, truncated) or ModelNotFound (with the names that exist).
        """
        if not name or len(name) > 4096 or _UNUSABLE.search(name):
            raise InvalidRequest("A model is named by a path without control characters.", param="model_path")
        path = self._resolve(str(place_of(Path(name))))
        if not name.lower().endswith(".gguf"):
            raise InvalidRequest(f"Models are .gguf files, got {name[:200]!r}.", param="model_path")
        first = current(parts(path)[0])
        if not is_file(path) and not is_file(first):
            raise ModelNotFound(f"There is no model {name[:200]!r}. {self._names()}", param="model_path")
        self.check(first, name)
        return first

    def check(self, path: Path, name: str) -> None:
        """Raise InvalidRequest unless every part of the model at `path` is there and has a sound header.

        A header is read once for each version of a file, and not at all where the sidecar says it was published here.
        """
        for part in parts(path):
            try:
                stat = part.stat()
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                with self._lock:
                    if self._checked.get(part) == seen:
                        continue
                if sidecar.read(path) is None:
                    gguf.read_header(part)
            except FileNotFoundError:
                raise InvalidRequest(
                    f"{name[:200]!r} is a split model and {part.name!r} is missing; POST /load brings all parts.",
                    param="model_path",
                ) from None
            except (gguf.MalformedGGUF, OSError) as error:
                reason = error if isinstance(error, gguf.MalformedGGUF) else "cannot be read by this process"
                raise InvalidRequest(
                    f"{part.name!r} {reason}. Replace the file, or bring it with POST /load.", param="model_path"
                ) from error
            with self._lock:
                self._checked[part] = seen

    def _resolve(self, name: str) -> Path:
        """The real path behind `name` if it is in MODELS_DIR, else the allowed path that it equals."""
        candidates = [Path(name)] if Path(name).is_absolute() else [self.root / name, Path(name)]
        found = [path for path in (self._served_as(candidate) for candidate in candidates) if path is not None]
        if not found:
            raise InvalidRequest(
                f"{name[:200]!r} is outside MODELS_DIR; use a name from GET /models.", param="model_path"
            )
        return next((path for path in found if is_file(path) or is_file(current(parts(path)[0]))), found[0])

    def _served_as(self, path: Path) -> Path | None:
        """What to open for `path`, None if it may not be served. Links are resolved anew: mounts come late."""
        real = real_path(path)
        if real.is_relative_to(real_path(self.root)):
            return real
        for allowed in self._allowed:
            for part in parts(allowed):  # may itself be a link, as files in a hub cache are; its name is to be kept
                if real_path(part) == real:
                    return part.absolute()
        return None

    def _names(self) -> str:
        names = [model.name for model in self.list()]
        if not names:
            return "MODELS_DIR is empty; POST /load brings a model."
        return f"There are: {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}."


def real_path(path: Path) -> Path:
    """`path` with its links resolved as far as they can be; `Path.resolve` would raise on a loop of links."""
    return Path(os.path.realpath(path))


def is_file(path: Path) -> bool:
    """False also for names that the file system does not take; `Path.is_file` raises on one of 300 bytes."""
    try:
        return path.is_file()
    except OSError:
        return False
