"""Sources: which source is asked for a model, in which order, and what follows when one fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from core.errors import InvalidRequest, ModelUnavailable
from core.store.model_file import Arrival
from core.store.reference import S3, HuggingFace
from core.store.source import Damaged, DownloadCancelled, Mirror, RemoteModel, Source

logger = logging.getLogger("slm.store")

_T = TypeVar("_T")
Failure = ModelUnavailable | InvalidRequest
FAILURES = (ModelUnavailable, InvalidRequest)


class Sources:
    """Thread-safe. `mirror` is told of wrong bytes."""

    def __init__(self, sources: tuple[Source, ...], mirror: Mirror | None = None) -> None:
        self._sources, self._mirror = sources, mirror
        self._lock = threading.Lock()
        self._failed: set[tuple[str, HuggingFace | S3]] = set()  # (source, model): failed last time, is asked last

    def find(self, reference: HuggingFace | S3, *, refresh: bool) -> Iterator[tuple[Source, RemoteModel]]:
        """The sources that have the model, in the order of `_ordered`, each with what it has.

        With `refresh`, the authority is asked first what the branch means now; the others must then have that very
        commit. Raises what the authority says (InvalidRequest), or ModelUnavailable if no source could answer.
        """
        failure: Failure | None = None
        told: RemoteModel | None = None
        asked = reference
        authority = next((source for source in self._sources if source.authority), None)
        if refresh and authority is not None and isinstance(reference, HuggingFace):
            try:
                told = authority.resolve(reference, refresh=True)
            except ModelUnavailable as error:
                failure = error
            if told is not None and told.commit is not None:
                asked = replace(reference, revision=told.commit)
        answered = False
        for source in self._ordered(reference):
            try:
                found = told if source is authority and refresh else source.resolve(asked, refresh=refresh)
            except ModelUnavailable as error:
                logger.warning("%s could not be asked for %s: %s", source.name, reference, error.message)
                failure = failure or error
                continue
            except InvalidRequest as error:  # final, unless another source has the model and is only asked later now
                failure = error
                continue
            if found is None or not _agree(found, told):
                continue
            answered = True
            resolved_at = told.resolved_at if told is not None else found.resolved_at
            yield source, replace(found, reference=reference, resolved_at=resolved_at)
        if not answered and failure is not None:
            raise failure

    def attempt(self, source: Source, found: RemoteModel, deliver: Callable[[], _T]) -> _T | Failure:
        """What `deliver` returns, or its error if another source may do better. Raises the other errors.

        Only the authority's word that a model is unfit (no GGUF, not the pinned one) is final: a copy may be wrong.
        """
        try:
            delivered = deliver()
        except DownloadCancelled:
            raise
        except ModelUnavailable as error:
            self._note_failure(source, found, error)
            return error
        except InvalidRequest as error:
            if source.authority or not isinstance(found.reference, HuggingFace):
                raise
            self._note_failure(source, found, error)
            return error
        self._note_success(source, found.reference)
        return delivered

    def watch(self, arrival: Arrival, source: Source, found: RemoteModel) -> Arrival:
        return _Watched(
            arrival,
            lambda: self._note_success(source, found.reference),
            lambda error: self._note_failure(source, found, error),
        )

    def _ordered(self, reference: HuggingFace | S3) -> tuple[Source, ...]:
        """The sources in their order, but those that failed to deliver this model last time come after the others."""
        with self._lock:
            return tuple(sorted(self._sources, key=lambda source: (source.name, reference) in self._failed))

    def _note_failure(self, source: Source, found: RemoteModel, error: Failure) -> None:
        """The next try asks this source last; the mirror replaces bytes that are wrong."""
        logger.warning("%s could not deliver %s: %s", source.name, found.reference, error.message)
        with self._lock:
            self._failed.add((source.name, found.reference))
        if isinstance(error, Damaged) and self._mirror is not None:
            self._mirror.distrust(found)

    def _note_success(self, source: Source, reference: HuggingFace | S3) -> None:
        with self._lock:
            self._failed.discard((source.name, reference))


class _Watched:
    """An `Arrival` whose end the store notes."""

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


def _agree(found: RemoteModel, told: RemoteModel | None) -> bool:
    """Whether a source has the files that the hub speaks of, as far as both say."""
    if told is None or found is told:
        return True
    if len(found.files) != len(told.files):
        return False
    return all(
        ours.size_bytes == theirs.size_bytes and (None in (ours.sha256, theirs.sha256) or ours.sha256 == theirs.sha256)
        for ours, theirs in zip(found.files, told.files, strict=True)
    )
