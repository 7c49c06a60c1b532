"""Download the files of one model into MODELS_DIR, verify them, and publish them atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from core.errors import InvalidRequest, ModelUnavailable
from core.store import gguf, lock, sidecar, target, versions
from core.store.directory import real_path
from core.store.partial import PartialFile, read_note, sha256_of
from core.store.reference import S3, HuggingFace, split_files
from core.store.sidecar import Part, Sidecar
from core.store.source import Cancelled, Damaged, DownloadCancelled, Progress, RemoteFile, RemoteModel, Source
from core.store.versions import current, parts

logger = logging.getLogger("slm.store")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Published:
    place: Path  # the name of the model in MODELS_DIR
    paths: tuple[Path, ...]  # its files
    sidecar: Sidecar
    fresh: bool  # False: the model was published before


def places(reference: HuggingFace | S3) -> tuple[str, ...]:
    """Return the names its first file may have in MODELS_DIR: its own, then one with its origin's folders."""
    if isinstance(reference, HuggingFace):
        first = split_files(reference.filename)[0]
        return (first, f"{reference.repo_id}/{first}")
    first = split_files(reference.key)[0]
    return (first.rsplit("/", 1)[-1], f"{reference.bucket}/{first}")


def origin(reference: HuggingFace | S3) -> str:
    """Return the origin that sidecars record: the reference to the first file, without its revision."""
    if isinstance(reference, HuggingFace):
        return f"hf://{reference.repo_id}/{split_files(reference.filename)[0]}"
    return f"s3://{reference.bucket}/{split_files(reference.key)[0]}"


class Download:
    """The download of one model from one source.

    Each name that readers follow is changed by a single rename. So a crash at any point leaves the old version or the
    new one. A model of one file is renamed to its place. The files of a split model go into a folder of their version,
    which no reader sees until the link at the place is replaced (`core.store.versions`).
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        remote: RemoteModel,
        progress: Progress,
        cancelled: Cancelled,
        *,
        generates: bool = True,
    ) -> None:
        self._generates = generates  # whether the model must be able to generate text
        self._root = root
        self._source = source
        self._remote = remote
        self._progress = progress
        self._cancelled = cancelled
        self._version = _version(remote)

    def run(self) -> Published:
        """Download and publish. Raise InvalidRequest (wrong sha256, no GGUF), ModelUnavailable or DownloadCancelled."""
        check_pins(self._remote)
        for name in places(self._remote.reference):
            place = self._root / name
            if not real_path(place.parent).is_relative_to(real_path(self._root)):
                raise InvalidRequest(
                    f"The folder of {name!r} is a link to a place outside MODELS_DIR.", param="filename"
                )
            try:
                landed = self._run_at(place)
            except OSError as error:
                raise self._explain(error) from error
            if landed is not None:
                return landed
        raise InvalidRequest(
            f"{name!r} in MODELS_DIR is another file, which the server did not download and does not replace. "
            "Move it away, then try again.",
            param="filename",
        )

    def _run_at(self, place: Path) -> Published | None:
        """Publish at `place`. Return None if it belongs to another model."""
        # 1) Is the model there already? Look before writing: a baked MODELS_DIR may be read-only.
        if (occupant := self._occupant(place)) != "none":
            if occupant != "another":
                self._tidy_quietly(place)
            return None if occupant == "another" else occupant
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock.hold(place, self._cancelled, self._waiting) as model_lock:
            if (occupant := self._occupant(place)) != "none":  # another process has published it
                model_lock.remove()
                return None if occupant == "another" else occupant
            home = versions.home(place, self._version)
            described = sidecar.read(home) if home != place else None
            if described is None or not self._is_same(described):
                described = self._receive(parts(home), model_lock)
            versions.switch(place, home)
            if model_lock.exclusive:
                versions.tidy(place, origin(self._remote.reference))
            model_lock.remove()
        return Published(place, parts(home), described, fresh=True)

    def _receive(self, targets: tuple[Path, ...], model_lock: lock.Lock) -> Sidecar:
        """Download, verify and publish the files. Remove whatever a later try cannot use."""
        folder = targets[0].parent
        with ExitStack() as stack:
            stack.callback(self._forget_if_nothing_arrived, folder, model_lock)
            folder.mkdir(parents=True, exist_ok=True)
            partials: list[PartialFile] = []
            start = 0
            for path, file in zip(targets, self._remote.files, strict=True):
                partials.append(partial := PartialFile(path, file, self._version, model_lock, start))
                stack.callback(partial.close)
                start += file.size_bytes
            target.need_disk(self._root, self._remote.size_bytes, sum(partial.done for partial in partials))
            try:
                return self._publish(targets, partials, self._fill(partials))
            except OSError as error:
                if error.errno in _NO_SPACE:
                    for partial in reversed(partials):  # free the disk
                        partial.discard()
                raise

    def _forget_if_nothing_arrived(self, folder: Path, model_lock: lock.Lock) -> None:
        if read_note(model_lock.note)[1] == 0:
            model_lock.remove()
            if len(self._remote.files) > 1:
                with contextlib.suppress(OSError):  # not empty, or missing
                    folder.rmdir()
                    folder.parent.rmdir()

    def _fill(self, partials: list[PartialFile]) -> list[str]:
        digests = []
        before = 0
        for partial, file, pinned in zip(partials, self._remote.files, self._pins, strict=True):
            digests.append(self._fill_one(partial, file, pinned, before))
            before += file.size_bytes
        return digests

    @property
    def _pins(self) -> tuple[str | None, ...]:
        return self._remote.reference.sha256 or (None,) * len(self._remote.files)

    def _fill_one(self, partial: PartialFile, file: RemoteFile, pinned: str | None, before: int) -> str:
        """Download the rest of a file and verify it. Return its sha256, computed here or by the source."""

        def progress(done: int, _total: int) -> None:
            self._progress(before + done, self._remote.size_bytes)

        progress(partial.done, partial.size)
        hashed = False
        if partial.done < partial.size:
            resumed = partial.done > 0
            hashed = self._source.download(self._remote, file, partial, progress=progress, cancelled=self._cancelled)
            hashed = hashed and not resumed and file.sha256 is not None
        partial.check_size()
        digest = file.sha256 if hashed and file.sha256 else partial.sha256(self._cancelled)
        if file.sha256 is not None and digest != file.sha256:
            partial.discard()
            raise Damaged(
                f"{file.path!r} arrived damaged from {self._source.name}: sha256 {digest}, expected {file.sha256}. "
                "The file was removed. Try again."
            )
        if pinned is not None and digest != pinned:
            partial.discard()
            raise _wrong_pin(file, digest, pinned)
        try:
            header = partial.check()
            if self._generates:
                gguf.check_generates(header)
        except gguf.MalformedGGUF as error:
            partial.discard()
            raise InvalidRequest(f"{file.path!r} {error}. It cannot be served.", param="filename") from error
        return digest

    def _publish(self, targets: tuple[Path, ...], partials: list[PartialFile], digests: list[str]) -> Sidecar:
        """Publish the first file last, because it names the model.

        The sidecar is written before that file. After a crash in between it is ignored, because its modification time
        does not match, but it still records which model the place belongs to.
        """
        described = self._describe(digests, [partial.sync() for partial in partials])
        for partial in partials[:0:-1]:
            partial.publish()
        sidecar.write(targets[0], described)
        partials[0].publish()
        return described

    def _tidy_quietly(self, place: Path) -> None:
        """Remove the leftovers of a process that ended after publishing, before it released its lock."""
        try:
            if versions.strays(place, origin(self._remote.reference)) or lock.path_of(place).exists():
                with lock.hold(place, lambda: True, self._waiting) as model_lock:
                    if model_lock.exclusive:
                        versions.tidy(place, origin(self._remote.reference))
                    model_lock.remove()
        except (OSError, DownloadCancelled):  # read-only, or another process holds the lock
            return

    def _describe(self, digests: list[str], stats: list[os.stat_result]) -> Sidecar:
        reference = self._remote.reference
        first, *others = [
            Part(digest, stat.st_size, stat.st_mtime_ns) for digest, stat in zip(digests, stats, strict=True)
        ]
        return Sidecar(
            origin=origin(reference),
            source=self._source.name,
            sha256=first.sha256,
            size_bytes=first.size_bytes,
            mtime_ns=first.mtime_ns,
            published=datetime.now(UTC).isoformat(timespec="seconds"),
            revision=reference.revision if isinstance(reference, HuggingFace) else None,
            commit=self._remote.commit,
            parts=tuple(others),
        )

    def _occupant(self, place: Path) -> Published | Literal["none", "another"]:
        """Return this model if it is at `place`, "another" for a different one, "none" if it may be replaced."""
        first = current(place)
        paths = parts(first)
        described = sidecar.read(first)
        owner = described or sidecar.peek(first)
        if owner is not None and owner.origin != origin(self._remote.reference) and first.exists():
            return "another"
        if described is None and is_sound(paths):
            described = self._adopt(paths)
            if described is None and owner is None:  # copied there by hand, and not the file of the source
                return "another"
        if described is None or not self._is_same(described):
            return "none"
        return Published(place, paths, self._renew(first, described), fresh=False)

    def _adopt(self, paths: tuple[Path, ...]) -> Sidecar | None:
        """Write a sidecar for files that were copied there by hand, if they are the files of the source."""
        stats = []
        for path, file in zip(paths, self._remote.files, strict=True):
            with path.open("rb") as opened:
                stat = os.fstat(opened.fileno())
                if stat.st_size != file.size_bytes or file.sha256 is None:
                    return None
                if sha256_of(opened.fileno(), self._cancelled) != file.sha256:
                    return None
                stats.append(stat)
        described = self._describe([file.sha256 or "" for file in self._remote.files], stats)
        _write_quietly(paths[0], described)
        return described

    def _renew(self, first: Path, described: Sidecar) -> Sidecar:
        """Record that the model is also the current one of `revision`, so that `present` needs no network."""
        reference = self._remote.reference
        if not isinstance(reference, HuggingFace) or described.names(reference.revision):
            return described
        renewed = replace(described, revision=reference.revision, commit=self._remote.commit)
        _write_quietly(first, renewed)
        return renewed

    def _is_same(self, described: Sidecar) -> bool:
        files = self._remote.files
        if described.total_bytes != self._remote.size_bytes or len(described.digests) != len(files):
            return False
        if self._remote.reference.sha256 not in ((), described.digests):
            return False
        if all(file.sha256 is not None for file in files):
            return described.digests == tuple(file.sha256 for file in files)
        return described.commit is not None and described.commit == self._remote.commit

    def _waiting(self, note: str) -> None:
        self._progress(min(read_note(note)[1], self._remote.size_bytes), self._remote.size_bytes)

    def _explain(self, error: OSError) -> ModelUnavailable:
        if error.errno in _NO_SPACE:
            return ModelUnavailable(
                target.no_room(self._remote.size_bytes, target.free_disk(self._root)), retry_after=None
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return ModelUnavailable(
                "MODELS_DIR cannot be written by this process. Change its owner, or set it to another folder.",
                retry_after=None,
            )
        logger.error("writing the model failed", exc_info=error)
        return ModelUnavailable("Writing the model into MODELS_DIR failed. The reason is in the log.")


def check_pins(remote: RemoteModel) -> None:
    """Raise InvalidRequest if the source names another sha256 than the pinned one, before any byte is read."""
    for file, pinned in zip(remote.files, remote.reference.sha256, strict=False):
        if file.sha256 not in (None, pinned):
            raise _wrong_pin(file, file.sha256 or "", pinned)


def _wrong_pin(file: RemoteFile, digest: str, pinned: str) -> InvalidRequest:
    return InvalidRequest(f"The sha256 of {file.path!r} is {digest}, not {pinned} as asked.", param="sha256")


def _version(remote: RemoteModel) -> str:
    """Return an id of the model's bytes: from the source's digests, or from commit and ETag where it names none.

    Bytes without a digest cannot be verified later, and after a power cut the recorded length may be ahead of the
    data. So they are not resumed after a reboot.
    """
    identities = []
    for file in remote.files:
        identity = file.sha256 or f"{remote.commit} {file.etag} {file.path} {_boot_id()}"
        identities.append(f"{identity} {file.size_bytes}")
    return hashlib.sha256("\n".join(identities).encode()).hexdigest()[:16]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return os.urandom(16).hex()


def is_sound(paths: tuple[Path, ...]) -> bool:
    """Return whether all are GGUF files with a valid header."""
    try:
        for path in paths:
            gguf.read_header(path)
    except (gguf.MalformedGGUF, OSError):
        return False
    return True


def _write_quietly(path: Path, described: Sidecar) -> None:
    with contextlib.suppress(OSError):  # read-only; the file itself is fine
        sidecar.write(path, described)
