"""Find the current version of a model in MODELS_DIR, and switch to another.

A model of one file is at its own name. The files of a split model must be of one version, and llama.cpp finds them by
the name of the first. So each downloaded version has a folder, and one link names the current version:

    big-00001-of-00003.gguf -> big-00001-of-00003.gguf.parts/<version>/big-00001-of-00003.gguf

Split models that were copied there by hand stay side by side.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from core.store import sidecar
from core.store.reference import split_files

PARTS = ".parts"  # suffix of the folder with a split model's versions


def current(first: Path) -> Path:
    """Return the actual first file of a model: `first`, or the target of its link to a version."""
    try:
        version = first.readlink()
    except OSError:
        return first
    ours = len(version.parts) == 3 and version.parts[0] == first.name + PARTS and version.name == first.name
    return first.parent / version if ours and ".." not in version.parts else first


def place_of(path: Path) -> Path:
    """Return the place of the model at `path`: the inverse of `current`, and `path` itself for other files."""
    versions = path.parent.parent
    first = split_files(path.name)[0]
    return versions.parent / first if versions.name == first + PARTS else path


def home(place: Path, version: str) -> Path:
    """Return the path of the first file of a downloaded version."""
    return place if len(parts(place)) == 1 else place.with_name(place.name + PARTS) / version / place.name


def holds(folder: str) -> bool:
    """Return whether a folder of this name holds versions."""
    return folder.lower().endswith(".gguf" + PARTS)


def parts(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that `path` belongs to, in order."""
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
    """Return leftovers of other versions: partial files, folders, and files side by side with the first one.

    The latter count only if they came from `origin`; otherwise they were copied there by hand.
    """
    first = current(place)
    names = "*" if first != place else glob.escape(place.name) + ".*"
    leftovers = list(first.parent.glob(f".{names}.part"))
    if first == place:
        return leftovers
    if (link := _link_of(place)).is_symlink():
        leftovers.append(link)
    leftovers += [version for version in first.parent.parent.iterdir() if version != first.parent]
    owner = sidecar.peek(place)  # of the first file that the link replaced; removed last
    if owner is not None and owner.origin == origin:
        leftovers += [path for path in parts(place)[1:] if path.is_file()] + [sidecar.path_of(place)]
    return leftovers


def tidy(place: Path, origin: str) -> None:
    """Remove the strays. Hold the model's lock."""
    for stray in strays(place, origin):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_of(place: Path) -> Path:
    """Return the temporary name of the link to a new version."""
    return place.with_name(f".{place.name}.link")
