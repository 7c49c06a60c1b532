"""Versions: the one of a model that is current under MODELS_DIR, and how another takes its place.

A model of one file lies under its name. The files of a split model must be one version, and llama.cpp finds them by the
name of the first, so each version that was downloaded has a folder, and one link says which version is current:

    big-00001-of-00003.gguf -> big-00001-of-00003.gguf.parts/<version>/big-00001-of-00003.gguf

Split models that were put here by hand lie side by side as they are.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from core.store import sidecar
from core.store.reference import split_files

PARTS = ".parts"  # what the folder of a split model's versions adds to the name of its first file


def current(first: Path) -> Path:
    """Where the first file of a model really lies: `first` itself, or what its link to a version names."""
    try:
        version = first.readlink()
    except OSError:
        return first
    ours = len(version.parts) == 3 and version.parts[0] == first.name + PARTS and version.name == first.name
    return first.parent / version if ours and ".." not in version.parts else first


def place_of(path: Path) -> Path:
    """The name under which the model at `path` is current: undoes `current`, and is any file's own path else."""
    versions = path.parent.parent
    first = split_files(path.name)[0]
    return versions.parent / first if versions.name == first + PARTS else path


def home(place: Path, version: str) -> Path:
    """Where the first file of a version that is downloaded goes."""
    return place if len(parts(place)) == 1 else place.with_name(place.name + PARTS) / version / place.name


def holds(folder: str) -> bool:
    """Whether a folder of this name is one of versions."""
    return folder.lower().endswith(".gguf" + PARTS)


def parts(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order."""
    return tuple(path.with_name(name) for name in split_files(path.name))


def switch(place: Path, first: Path) -> None:
    """Make the version at `first` the current one, by one rename."""
    if first in (place, current(place)):
        return
    sync_folder(first.parent.parent)
    link = _link_of(place)
    link.unlink(missing_ok=True)
    link.symlink_to(first.relative_to(place.parent))
    link.replace(place)
    sync_folder(place.parent)


def strays(place: Path, origin: str) -> list[Path]:
    """What is not of the current version: what arrived of others, their folders, files that lay side by side.

    The latter only if they came from `origin`: else somebody put them there.
    """
    first = current(place)
    names = "*" if first != place else glob.escape(place.name) + ".*"
    found = list(first.parent.glob(f".{names}.part"))
    if first == place:
        return found
    if (link := _link_of(place)).is_symlink():
        found.append(link)
    found += [version for version in first.parent.parent.iterdir() if version != first.parent]
    owner = sidecar.peek(place)  # of the first file that the link took the place of; removed last
    if owner is not None and owner.origin == origin:
        found += [path for path in parts(place)[1:] if path.is_file()] + [sidecar.path_of(place)]
    return found


def tidy(place: Path, origin: str) -> None:
    """Remove the strays. Hold the model's lock."""
    for stray in strays(place, origin):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_of(place: Path) -> Path:
    """The link to a new version before it takes the place."""
    return place.with_name(f".{place.name}.link")
