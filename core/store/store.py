"""Download models, verified and atomically, and find those on this machine."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from core.errors import InvalidRequest, ModelNotFound, ModelUnavailable
from core.store import sidecar, target
from core.store.directory import Directory, LocalModel, is_file
from core.store.download import Download, Published, check_pins, is_sound, origin, places
from core.store.memory import Memory
from core.store.model_file import ModelFile
from core.store.partial import sha256_of
from core.store.reference import S3, File, HuggingFace, Reference, is_commit, model_name, pin
from core.store.source import Cancelled, DownloadCancelled, Mirror, Progress, RemoteModel, Source, never
from core.store.sources import FAILURES, Failure, Sources
from core.store.versions import current, parts

logger = logging.getLogger("slm.store")


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of `fetch`. `path` is the model's (first) file in MODELS_DIR."""

    status: Literal["downloaded", "present"]
    path: Path
    size_bytes: int
    sha256: str
    source: str  # "huggingface", "s3" or "file"
    commit: str | None = None


class Store:
    """All methods block on disk or network: call them in worker threads. Thread-safe.

    `sources` are asked in order. Models from Hugging Face are offered to `mirror`. `allowed` are files outside
    `models_dir` that may be served (configured, embedded, baked). With target "auto", `prefer_memory` chooses memory
    where both memory and disk have room. `generates` refuses embedding models.
    """

    def __init__(
        self,
        models_dir: Path,
        sources: tuple[Source, ...] = (),
        mirror: Mirror | None = None,
        allowed: tuple[Path, ...] = (),
        target: Literal["auto", "disk", "memory"] = "auto",
        prefer_memory: bool = False,
        generates: bool = True,
    ) -> None:
        self._directory = Directory(models_dir, allowed, generates=generates)
        self._generates = generates
        self._sources = Sources(sources, mirror)
        self._mirror = mirror
        self._target = target
        self._prefer_memory = prefer_memory
        self._memory = Memory()
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}  # file: (inode, size, mtime), its sha256

    def list(self) -> tuple[LocalModel, ...]:
        """Return every complete model under MODELS_DIR and its subfolders, sorted by name."""
        return self._directory.list()

    def locate(self, path: str) -> Path:
        """Return the path of a local model that a client names: in MODELS_DIR (links resolved), or an allowed file.

        Raise InvalidRequest (outside MODELS_DIR, not a GGUF, truncated) or ModelNotFound (with the existing names).
        """
        return self._directory.locate(path)

    def present(self, reference: Reference) -> Path | None:
        """Return the model's path on this machine, or None if it must be downloaded. No network.

        Raise InvalidRequest if `reference` names a local file that may not be served, is damaged, or does not have
        the pinned sha256.
        """
        if isinstance(reference, File):
            try:
                return self._locate_pinned(reference)
            except ModelNotFound:
                return None
        return self._find(reference)

    def fetch(
        self,
        reference: HuggingFace | S3,
        *,
        sha256: str | None = None,
        refresh: bool = True,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Fetched:
        """Download a model into MODELS_DIR, from the first source that has it.

        `refresh` asks Hugging Face for the current commit of a branch. `sha256` pins a model of one file, as
        `reference.sha256` does. Raise InvalidRequest (no such repository, file or revision; wrong sha256; not a GGUF),
        ModelUnavailable (network, disk space) or DownloadCancelled.
        """
        reference = pin(reference, (sha256,) if sha256 else ())
        if isinstance(reference, HuggingFace) and is_commit(reference.revision):
            refresh = False  # a commit never changes
        report = progress or _ignore
        stop = cancelled or never
        if not refresh and (path := self._find(reference)) is not None:
            return self._present(reference, path, stop)
        failure: Failure | None = None
        try:
            for source, remote in self._sources.find(reference, refresh=refresh, cancelled=stop):
                download = Download(self._directory.root, source, remote, report, stop, generates=self._generates)
                landed = self._sources.attempt(source, remote, download.run)
                if isinstance(landed, FAILURES):
                    failure = failure or landed
                    continue
                if isinstance(reference, HuggingFace) and self._mirror is not None:
                    self._mirror.offer(reference, remote, landed.paths)
                return _to_fetched(landed)
        except DownloadCancelled:
            raise
        except ModelUnavailable as error:
            failure = failure or error
        if (path := self._find(reference)) is not None:
            logger.warning("%s is served as it is here: no source answered", reference)
            return self._present(reference, path, stop)
        raise failure or ModelNotFound(f"No source has {reference}.", param="filename")

    def open(
        self, reference: Reference, *, progress: Progress | None = None, cancelled: Cancelled | None = None
    ) -> ModelFile:
        """Return a model that llama.cpp can open now: a local file, or one in memory, or a download to MODEL_TARGET.

        A model in memory is shared if the first source that answers still has its bytes, or if none answers. A download
        may still be arriving.
        """
        if isinstance(reference, File):
            return self._local(self._locate_pinned(reference))
        if (path := self._find(reference)) is not None:
            return self._local(path)
        if (model := self._open_memory(reference, progress or _ignore, cancelled or never)) is not None:
            return model
        fetched = self.fetch(reference, refresh=False, progress=progress, cancelled=cancelled)
        return self._local(fetched.path)

    def idle(self, deadline: float | None) -> bool:
        """Upload models from Hugging Face to the mirror, until `deadline` (monotonic clock). Never raise.

        For Lambda, where nothing runs between invocations: call it after a response's last byte and before requesting
        the next event. Return True if nothing is left to do; the call is cheap then.
        """
        return self._mirror is None or self._mirror.run_pending(deadline)

    def _open_memory(self, reference: HuggingFace | S3, progress: Progress, cancelled: Cancelled) -> ModelFile | None:
        """Return the model in memory, downloaded unless its bytes are there. Return None if it must go to the disk."""
        if self._target == "disk":
            return None
        answered = False
        try:
            for source, remote in self._sources.find(reference, refresh=False, cancelled=cancelled):
                answered = True
                if (shared := self._memory.share(reference, remote)) is not None:
                    return shared
                where = target.choose(
                    self._target, self._directory.root, remote.size_bytes, prefer_memory=self._prefer_memory
                )
                if where == "disk" or len(remote.files) > 1 or not target.has_memfd():  # parts need their file names
                    return None
                target.need_memory(remote.size_bytes)
                model = self._sources.attempt(
                    source, remote, partial(_open_memory, source, remote, progress, cancelled)
                )
                if isinstance(model, ModelFile):
                    return self._keep(source, remote, model)
        except DownloadCancelled:
            raise
        except ModelUnavailable:
            if answered or (shared := self._memory.share(reference, None)) is None:
                raise
            logger.warning("%s is served as it is in memory: no source answered", reference)
            return shared
        return None

    def _keep(self, source: Source, remote: RemoteModel, model: ModelFile) -> ModelFile:
        """Watch the arrival of a model that goes to memory, offer it to the mirror, and keep it for `open`."""
        if model.arrival is not None:
            model = replace(model, arrival=self._sources.watch(model.arrival, source, remote))
        if isinstance(remote.reference, HuggingFace) and self._mirror is not None:
            self._mirror.offer(remote.reference, remote, (model.path,))
        return self._memory.add(remote, model)

    def _find(self, reference: HuggingFace | S3) -> Path | None:
        """Return the file that `fetch` would publish for `reference`, if it is there and right."""
        for place in places(reference):
            path = self._directory.root / place
            paths = parts(current(path))
            if not all(map(is_file, paths)):
                continue
            if (described := sidecar.read(paths[0])) is not None:
                if _matches(described, reference):
                    return path
                continue
            if isinstance(reference, HuggingFace) and reference.revision != "main":
                continue  # a file without a sidecar has no known revision
            if is_sound(paths) and self._wrong_digest(paths, reference.sha256) is None:
                return path
        return None

    def _locate_pinned(self, reference: File) -> Path:
        """Return the local file of `reference`. Raise InvalidRequest also if it does not have the pinned sha256."""
        path = self.locate(reference.path)
        if (wrong := self._wrong_digest(parts(path), reference.sha256)) is not None:
            raise InvalidRequest(
                f"The sha256 of {wrong[0].name!r} is {wrong[1]}, not {wrong[2]} as set in MODEL_SHA256. Replace the "
                "file or change the setting.",
                param="model_path",
            )
        return path

    def _wrong_digest(self, paths: tuple[Path, ...], pinned: tuple[str, ...]) -> tuple[Path, str, str] | None:
        """Return the first file without its pinned sha256, with its actual and its expected one.

        Each version of a file is read once: about a second per gigabyte.
        """
        for path, expected in zip(paths, pinned, strict=False):
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                with self._lock:
                    read, digest = self._digests.get(path, (None, ""))
                if read != version:
                    digest = sha256_of(file.fileno(), never)
                    with self._lock:
                        self._digests[path] = (version, digest)
            if digest != expected:
                return path, digest, expected
        return None

    def _present(self, reference: HuggingFace | S3, path: Path, cancelled: Cancelled) -> Fetched:
        first = current(path)
        described = sidecar.read(first)
        size = sum(part.stat().st_size for part in parts(first))
        if described is not None:
            return Fetched("present", path, size, described.sha256, described.source, described.commit)
        with first.open("rb") as file:
            return Fetched("present", path, size, sha256_of(file.fileno(), cancelled), "file")

    def _local(self, path: Path) -> ModelFile:
        first = current(path)
        described = sidecar.read(first)
        return ModelFile(
            name=model_name(first.name),
            path=first,
            size_bytes=sum(part.stat().st_size for part in parts(first)),
            source=described.source if described else "file",
            sha256=described.sha256 if described else None,
            commit=described.commit if described else None,
        )


def _to_fetched(landed: Published) -> Fetched:
    described = landed.sidecar
    return Fetched(
        "downloaded" if landed.fresh else "present",
        landed.place,
        described.total_bytes,
        described.sha256,
        described.source,
        described.commit,
    )


def _matches(described: sidecar.Sidecar, reference: HuggingFace | S3) -> bool:
    """Return whether the sidecar describes the model that `reference` names."""
    if described.origin != origin(reference) or reference.sha256 not in ((), described.digests):
        return False
    return not isinstance(reference, HuggingFace) or described.names(reference.revision)


def _open_memory(source: Source, remote: RemoteModel, progress: Progress, cancelled: Cancelled) -> ModelFile | None:
    check_pins(remote)
    name = model_name(remote.files[0].path)
    return source.open_memory(remote, name=name, progress=progress, cancelled=cancelled)


def _ignore(_done: int, _total: int) -> None:
    return None
