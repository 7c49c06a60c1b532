"""Download: brings the files of one model from a source into MODELS_DIR, whole and verified, or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from core.errors import InvalidRequest, ModelUnavailable
from core.store import gguf, lock, sidecar, target
from core.store.directory import parts, real_path
from core.store.partial import PartialFile, read_note, sha256_of
from core.store.reference import S3, HuggingFace
from core.store.sidecar import Sidecar
from core.store.source import Cancelled, Damaged, Found, Progress, RemoteFile, Source

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Landed:
    paths: tuple[Path, ...]
    sidecars: tuple[Sidecar, ...]
    fresh: bool  # False: it was there already


def places(reference: HuggingFace | S3) -> tuple[str, ...]:
    """Where its first file may lie under MODELS_DIR: under its own name, or its origin's if another has that."""
    if isinstance(reference, HuggingFace):
        return (reference.filename, f"{reference.repo_id}/{reference.filename}")
    return (reference.key.rsplit("/", 1)[-1], f"{reference.bucket}/{reference.key}")


def origin(reference: HuggingFace | S3, file: str | None = None) -> str:
    """What a sidecar calls a file's origin: the reference without its revision."""
    if isinstance(reference, HuggingFace):
        return f"hf://{reference.repo_id}/{file or reference.filename}"
    return f"s3://{reference.bucket}/{file or reference.key}"


class Download:
    """One model, from one source."""

    def __init__(self, root: Path, source: Source, found: Found, progress: Progress, cancelled: Cancelled) -> None:
        self._root = root
        self._source = source
        self._found = found
        self._progress = progress
        self._cancelled = cancelled

    def run(self) -> Landed:
        """Raises InvalidRequest (wrong sha256, not a GGUF), ModelUnavailable (network, disk), DownloadCancelled."""
        check_pins(self._found)
        candidates = places(self._found.reference)
        for place in candidates:
            targets = parts(self._root / place)
            if not real_path(targets[0].parent).is_relative_to(real_path(self._root)):
                raise InvalidRequest(f"The folder of {place!r} is a link out of MODELS_DIR.", param="filename")
            try:
                landed = self._run_at(targets, last=place == candidates[-1])
            except OSError as error:
                raise self._explain(error) from error
            if landed is not None:
                return landed
        raise AssertionError("the last place is always taken")

    def _run_at(self, targets: tuple[Path, ...], *, last: bool) -> Landed | None:
        """None if the place belongs to another model."""
        # Before anything is written: a baked MODELS_DIR may be read-only, and what is there needs no writing.
        if (there := self._occupant(targets, last=last)) != "none":
            return None if there == "another" else there
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            locks = [stack.enter_context(lock.hold(path, self._cancelled, self._waiting)) for path in targets]
            if (there := self._occupant(targets, last=last)) != "none":  # another process brought it meanwhile
                for held in locks:
                    held.remove()
                return None if there == "another" else there
            partials = []
            for path, file, held in zip(targets, self._found.files, locks, strict=True):
                partial = PartialFile(path, file, file.sha256 or f"{self._found.commit} {file.etag} {file.path}", held)
                stack.callback(partial.close)
                partials.append(partial)
            target.need_disk(self._root, self._found.size_bytes, sum(partial.done for partial in partials))
            try:
                digests = self._fill(partials)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    for partial in partials:  # keeping it would keep the disk full
                        partial.discard()
                raise
            sidecars = self._publish(targets, partials, digests)
            for held in locks:
                held.remove()
        return Landed(targets, sidecars, fresh=True)

    def _fill(self, partials: list[PartialFile]) -> list[str]:
        digests = []
        before = 0
        for partial, file, pinned in zip(partials, self._found.files, self._pins, strict=True):
            digests.append(self._fill_one(partial, file, pinned, before))
            before += file.size_bytes
        return digests

    @property
    def _pins(self) -> tuple[str | None, ...]:
        return self._found.reference.sha256 or (None,) * len(self._found.files)

    def _fill_one(self, partial: PartialFile, file: RemoteFile, pinned: str | None, before: int) -> str:
        """Download the rest of a file and verify it. Returns its sha256, which is computed here or by the source."""

        def progress(done: int, _total: int) -> None:
            self._progress(before + done, self._found.size_bytes)

        progress(partial.done, partial.size)
        hashed = False
        if partial.done < partial.size:
            resumed = partial.done > 0
            hashed = self._source.download(self._found, file, partial, progress=progress, cancelled=self._cancelled)
            hashed = hashed and not resumed and file.sha256 is not None
        partial.check_size()
        digest = file.sha256 if hashed and file.sha256 else partial.sha256(self._cancelled)
        if file.sha256 is not None and digest != file.sha256:
            partial.discard()
            raise Damaged(
                f"{file.path!r} arrived damaged from {self._source.name}: sha256 {digest}, expected {file.sha256}. "
                "Nothing of it was kept; try again."
            )
        if pinned is not None and digest != pinned:
            partial.discard()
            raise _wrong_pin(file, digest, pinned)
        try:
            partial.check()
        except gguf.MalformedGGUF as error:
            partial.discard()
            raise InvalidRequest(f"{file.path!r} {error}. It cannot be served.", param="filename") from error
        return digest

    def _publish(
        self, targets: tuple[Path, ...], partials: list[PartialFile], digests: list[str]
    ) -> tuple[Sidecar, ...]:
        """The first file last: it is the one that names the model.

        A sidecar goes before its file: if the process ends between the two, it is not believed (its time is not the
        old file's) but still says whose place this is.
        """
        sidecars: list[Sidecar] = []
        for path, partial, file, digest in reversed(
            list(zip(targets, partials, self._found.files, digests, strict=True))
        ):
            described = self._describe(file, digest, partial.sync())
            sidecar.write(path, described)
            partial.publish()
            sidecars.insert(0, described)
        return tuple(sidecars)

    def _describe(self, file: RemoteFile, digest: str, stat: os.stat_result) -> Sidecar:
        reference = self._found.reference
        return Sidecar(
            origin=origin(reference, file.path),
            source=self._source.name,
            sha256=digest,
            size_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            published=datetime.now(UTC).isoformat(timespec="seconds"),
            revision=reference.revision if isinstance(reference, HuggingFace) else None,
            commit=self._found.commit,
        )

    def _occupant(self, targets: tuple[Path, ...], *, last: bool) -> Landed | Literal["none", "another"]:
        """What lies at `targets`: this very model, another one, or nothing that may not be replaced."""
        if not any(path.exists() for path in targets):
            return "none"
        another: Literal["none", "another"] = "none" if last else "another"
        sidecars: list[Sidecar] = []
        for path, file, pinned in zip(targets, self._found.files, self._pins, strict=True):
            known = sidecar.read(path)
            owner = known or sidecar.peek(path)
            if owner is not None and owner.origin != origin(self._found.reference, file.path):
                return another
            if known is None and is_sound((path,)):
                known = self._adopt(path, file)
                if (
                    known is None and owner is None
                ):  # put there by hand, and not what the source has: not ours to replace
                    return another
            if known is None or not self._is_same(known, file, pinned):
                return "none"
            sidecars.append(known)
        return Landed(targets, tuple(map(self._renew, targets, sidecars)), fresh=False)

    def _adopt(self, path: Path, file: RemoteFile) -> Sidecar | None:
        """A sidecar for a file that was put there by hand, if it is `file`."""
        with path.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            if stat.st_size != file.size_bytes or file.sha256 is None:
                return None
            if sha256_of(opened.fileno(), self._cancelled) != file.sha256:
                return None
        described = self._describe(file, file.sha256, stat)
        _write_quietly(path, described)
        return described

    def _renew(self, path: Path, known: Sidecar) -> Sidecar:
        """Note that the file is also what `revision` means now, so that `present` knows it without the network."""
        reference = self._found.reference
        if not isinstance(reference, HuggingFace) or known.names(reference.revision):
            return known
        renewed = replace(known, revision=reference.revision, commit=self._found.commit)
        _write_quietly(path, renewed)
        return renewed

    def _is_same(self, known: Sidecar, file: RemoteFile, pinned: str | None) -> bool:
        if known.size_bytes != file.size_bytes or (pinned is not None and known.sha256 != pinned):
            return False
        if file.sha256 is not None:
            return known.sha256 == file.sha256
        return known.commit is not None and known.commit == self._found.commit

    def _waiting(self, note: str) -> None:
        self._progress(min(read_note(note)[1], self._found.size_bytes), self._found.size_bytes)

    def _explain(self, error: OSError) -> ModelUnavailable:
        if error.errno in _NO_ROOM:
            return ModelUnavailable(
                target.no_room(self._found.size_bytes, target.free_disk(self._root)), retry_after=None
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return ModelUnavailable(
                "MODELS_DIR cannot be written by this process; change its owner, or point it elsewhere.",
                retry_after=None,
            )
        log.error("writing the model failed", exc_info=error)
        return ModelUnavailable("Writing the model into MODELS_DIR failed; the log has the reason.")


def check_pins(found: Found) -> None:
    """Raise InvalidRequest if the source itself names another sha256 than the pinned one, before a byte is read."""
    for file, pinned in zip(found.files, found.reference.sha256, strict=False):
        if file.sha256 not in (None, pinned):
            raise _wrong_pin(file, file.sha256 or "", pinned)


def _wrong_pin(file: RemoteFile, digest: str, pinned: str) -> InvalidRequest:
    return InvalidRequest(f"The sha256 of {file.path!r} is {digest}, not {pinned} as asked.", param="sha256")


def is_sound(paths: tuple[Path, ...]) -> bool:
    """Whether all are GGUF files with a good header."""
    try:
        for path in paths:
            gguf.read_header(path)
    except (gguf.MalformedGGUF, OSError):
        return False
    return True


def _write_quietly(path: Path, described: Sidecar) -> None:
    with contextlib.suppress(OSError):  # read-only: the file is good all the same
        sidecar.write(path, described)
