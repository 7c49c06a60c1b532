"""Keep track of the models in memory, so that opening one again does not download it again."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from core.errors import ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace
from core.store.source import RemoteModel


@dataclass(slots=True, eq=False)
class _Copy:
    """The bytes of one model, and how many ModelFiles use them."""

    remote: RemoteModel
    model: ModelFile
    holders: int = 0


class Memory:
    """Thread-safe. The bytes of a model are freed when each ModelFile that `add` or `share` returned is released."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies: dict[HuggingFace | S3, _Copy] = {}  # the newest of each reference

    def add(self, remote: RemoteModel, model: ModelFile) -> ModelFile:
        """Keep a model that was downloaded, for `share`. Use the returned one."""
        copy = _Copy(remote, model)
        with self._lock:
            self._copies[remote.reference] = copy
            return self._hold(copy)

    def share(self, reference: HuggingFace | S3, remote: RemoteModel | None) -> ModelFile | None:
        """Return the model in memory if it has the bytes of `remote`. With None, any version will do.

        Return None without one. Block until it is verified, if it is still arriving.
        """
        with self._lock:
            copy = self._copies.get(reference)
            if copy is None or (remote is not None and not same_bytes(copy.remote, remote)):
                return None
            model = self._hold(copy)
        if model.arrival is not None:
            try:
                model.arrival.wait()
            except ModelUnavailable:
                model.release()
                return None
            model = replace(model, arrival=None)
        return model if remote is None else replace(model, source=remote.source, commit=remote.commit)

    def _hold(self, copy: _Copy) -> ModelFile:
        """Return the model with a release of its own. Call it under the lock."""
        copy.holders += 1
        released = False

        def release() -> None:
            nonlocal released
            with self._lock:
                if released:
                    return
                released = True
                copy.holders -= 1
                if copy.holders:
                    return
                if self._copies.get(copy.remote.reference) is copy:
                    del self._copies[copy.remote.reference]
            copy.model.release()

        return replace(copy.model, release=release)


def same_bytes(first: RemoteModel, second: RemoteModel) -> bool:
    """Return whether two answers of sources certainly name the same bytes: by sha256, or by one source's ETag."""
    if len(first.files) != len(second.files):
        return False
    for file, twin in zip(first.files, second.files, strict=True):
        if file.size_bytes != twin.size_bytes:
            return False
        if file.sha256 is not None and twin.sha256 is not None:
            if file.sha256 != twin.sha256:
                return False
        elif first.source != second.source or file.etag is None or file.etag != twin.etag:
            return False
    return True
