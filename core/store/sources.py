"""Choose the source of a model: in which order sources are asked, and what happens when one fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from core.errors import InvalidRequest, ModelUnavailable
from core.store.model_file import Arrival
from core.store.reference import S3, HuggingFace
from core.store.source import Cancelled, Damaged, DownloadCancelled, Mirror, RemoteModel, Source

logger = logging.getLogger("slm.store")

_T = TypeVar("_T")
Failure = ModelUnavailable | InvalidRequest
FAILURES = (ModelUnavailable, InvalidRequest)


class Sources:
    """Thread-safe. Wrong bytes are reported to `mirror`."""

    def __init__(self, sources: tuple[Source, ...], mirror: Mirror | None = None) -> None:
        self._sources, self._mirror = sources, mirror
        self._lock = threading.Lock()
        self._failed: set[tuple[str, HuggingFace | S3]] = set()  # (source, model) of failed tries

    def find(
        self, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled
    ) -> Iterator[tuple[Source, RemoteModel]]:
        """Yield each source that has the model, with its files, in the order of `_ordered`.

        With `refresh`, the authority is asked first for the branch's current commit, and the other sources must have
        that commit. Raise the authority's InvalidRequest, or ModelUnavailable if no source could answer.
        """
        # 1) With `refresh`, resolve the branch at the authority.
        failure: Failure | None = None
        current: RemoteModel | None = None
        pinned = reference
        authority = next((source for source in self._sources if source.authority), None)
        if refresh and authority is not None and isinstance(reference, HuggingFace):
            answer = _ask(authority, reference, refresh=True, cancelled=cancelled)
            if isinstance(answer, ModelUnavailable):
                failure = answer
            else:
                current = answer
            if current is not None and current.commit is not None:
                pinned = replace(reference, revision=current.commit)
        # 2) Yield every source that has these files.
        answered = False
        for source in self._ordered(reference):
            model = current
            if source is not authority or not refresh:
                try:
                    answer = _ask(source, pinned, refresh=refresh, cancelled=cancelled)
                except InvalidRequest as error:  # final, unless a source that is asked later has the model
                    failure = error
                    continue
                if isinstance(answer, ModelUnavailable):
                    failure = failure or answer
                    continue
                model = answer
            if model is None or not _agree(model, current):
                continue
            answered = True
            resolved_at = current.resolved_at if current is not None else model.resolved_at
            yield source, replace(model, reference=reference, resolved_at=resolved_at)
        # 3) No source has them: report the first failure.
        if not answered and failure is not None:
            raise failure

    def attempt(self, source: Source, remote: RemoteModel, deliver: Callable[[], _T]) -> _T | Failure:
        """Return what `deliver` returns, or its error if another source may succeed. Raise its other errors.

        InvalidRequest (not a GGUF, not the pinned sha256) is final from the authority only: a copy may be wrong.
        """
        try:
            delivered = deliver()
        except DownloadCancelled:
            raise
        except ModelUnavailable as error:
            self._note_failure(source, remote, error)
            return error
        except InvalidRequest as error:
            if source.authority or not isinstance(remote.reference, HuggingFace):
                raise
            self._note_failure(source, remote, error)
            return error
        self._note_success(source, remote.reference)
        return delivered

    def watch(self, arrival: Arrival, source: Source, remote: RemoteModel) -> Arrival:
        return _Watched(
            arrival,
            lambda: self._note_success(source, remote.reference),
            lambda error: self._note_failure(source, remote, error),
        )

    def _ordered(self, reference: HuggingFace | S3) -> tuple[Source, ...]:
        """Return the sources in order, with those last that failed to deliver this model the last time."""
        with self._lock:
            return tuple(sorted(self._sources, key=lambda source: (source.name, reference) in self._failed))

    def _note_failure(self, source: Source, remote: RemoteModel, error: Failure) -> None:
        """Ask this source last at the next try, and have the mirror replace wrong bytes."""
        logger.warning("%s could not deliver %s: %s", source.name, remote.reference, error.message)
        with self._lock:
            self._failed.add((source.name, remote.reference))
        if isinstance(error, Damaged) and self._mirror is not None:
            self._mirror.distrust(remote)

    def _note_success(self, source: Source, reference: HuggingFace | S3) -> None:
        with self._lock:
            self._failed.discard((source.name, reference))


class _Watched:
    """An `Arrival` that reports its result to the store."""

    def __init__(
        self, arrival: Arrival, succeeded: Callable[[], None], failed: Callable[[ModelUnavailable], None]
    ) -> None:
        self._arrival, self._succeeded, self._failed = arrival, succeeded, failed
        self.progress, self.cancel = arrival.progress, arrival.cancel

    def wait(self) -> None:
        try:
            self._arrival.wait()
        except DownloadCancelled:
            raise
        except ModelUnavailable as error:
            self._failed(error)
            raise
        self._succeeded()


def _ask(
    source: Source, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled
) -> RemoteModel | ModelUnavailable | None:
    """Return what `source` resolves, or why it cannot answer."""
    try:
        return source.resolve(reference, refresh=refresh, cancelled=cancelled)
    except DownloadCancelled:
        raise
    except ModelUnavailable as error:
        logger.warning("%s could not be asked for %s: %s", source.name, reference, error.message)
        return error


def _agree(model: RemoteModel, current: RemoteModel | None) -> bool:
    """Return whether a source has the same files as the authority, as far as both name sizes and digests."""
    if current is None or model is current:
        return True
    if len(model.files) != len(current.files):
        return False
    return all(
        copy.size_bytes == file.size_bytes and (None in (copy.sha256, file.sha256) or copy.sha256 == file.sha256)
        for copy, file in zip(model.files, current.files, strict=True)
    )
