"""Hugging Face Hub as a Source: huggingface_hub's own session, headers and errors, straight into the store's file.

huggingface_hub knows the token, the endpoint, HF_HOME, HF_HUB_OFFLINE and the hub's error codes; its cache is not used,
so that a model lies on the disk once. Its `http_get` is not used either: it hands over 10 MiB at a time, and so reports
progress and notices a cancellation no more often than that. Files kept by xet come over the hub's HTTP bridge.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from adapters.huggingface.errors import explain, is_transient
from core.errors import ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace, split_files
from core.store.source import Cancelled, DownloadCancelled, Partial, Progress, RemoteFile, RemoteModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfFileMetadata

logger = logging.getLogger("slm.huggingface")

TRIES = 5  # in a row without a new byte
HEAD_TRIES = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LANDED_EVERY = 1 << 20


class Hub:
    """A Source for hf:// references. `token` None: huggingface_hub's own (HF_TOKEN, or the one it saved in HF_HOME)."""

    name = "huggingface"
    authority = True

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        *,
        threads: int = 0,
        part_bytes: int = 0,
        backoff_s: float = 0.5,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._threads = threads or 4
        self._part_bytes = part_bytes or 8 << 20
        self._backoff_s = backoff_s

    def resolve(self, reference: HuggingFace | S3, *, refresh: bool) -> RemoteModel | None:
        """Ask the hub for commit, size and sha256 of each file (one HEAD each).

        Raises ModelNotFound, InvalidRequest (gated, disabled, refused token) or ModelUnavailable.
        """
        if not isinstance(reference, HuggingFace):
            return None
        files: list[RemoteFile] = []
        commit: str | None = None
        resolved_at = time.time()
        for path in split_files(reference.filename):
            file, commit = self._head(reference, path, commit or reference.revision)
            files.append(file)
        return RemoteModel(self.name, reference, tuple(files), commit, resolved_at)

    def download(
        self, found: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """GETs from where the file ends, again after each break, until it is whole. Verification is the store's."""
        from huggingface_hub.errors import HTTPError

        assert isinstance(found.reference, HuggingFace)
        url = self._url(found, file)
        failures = 0
        while partial.done < partial.size:
            before = partial.done
            try:
                self._get(url, partial, progress, cancelled)
                failure: Exception | None = None
            except HTTPError as error:
                failure = error
            if partial.done > before:
                failures = 0
            if partial.done == partial.size:
                break
            failures += 1
            if failures >= TRIES or not is_transient(failure):
                raise explain(failure, found.reference, file.path, self._endpoint) from failure
            logger.info("%s broke off at %d of %d bytes; going on", file.path, partial.done, partial.size)
            _sleep(self._pause(failures), cancelled)
        return False

    def open_memory(
        self, found: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """In parallel ranged reads of our own. Returns when all is there: the hub names one sha256, for the whole."""
        from adapters.transfer import memfd as memory
        from adapters.transfer.checksum import Sha256
        from adapters.transfer.transfer import Transfer

        file = found.files[0]
        expected = next(iter(found.reference.sha256), file.sha256)
        if len(found.files) != 1 or expected is None or not memory.is_supported():
            return None
        origin, checksum = _Origin(self, found, file), Sha256(expected)

        def begin(fd: int) -> Transfer:
            return Transfer(
                origin, fd, file.size_bytes, checksum=checksum, threads=self._threads, part_bytes=self._part_bytes
            )

        return memory.receive(found, begin, name, progress, cancelled, whole=True)

    def locate(self, found: RemoteModel, file: RemoteFile) -> tuple[str, dict[str, str]]:
        """URL and headers with which any HTTP client can read ranges of the file: the hub's redirect, followed now.

        What it redirects to is signed and ends some time. The token goes to the hub's own host only.
        Raises what `resolve` raises.
        """
        assert isinstance(found.reference, HuggingFace)
        url, metadata = self._metadata(found.reference, file.path, found.commit or found.reference.revision)
        location = urljoin(url, metadata.location)
        same = urlsplit(location)[:2] == urlsplit(url)[:2]
        return location, dict(self._headers()) if same else {}

    def _url(self, found: RemoteModel, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        assert isinstance(found.reference, HuggingFace)
        revision = found.commit or found.reference.revision
        return hf_hub_url(found.reference.repo_id, file.path, revision=revision, endpoint=self._endpoint)

    def _headers(self) -> Mapping[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self._token, library_name="slm-api-server")

    def _head(self, reference: HuggingFace, path: str, revision: str) -> tuple[RemoteFile, str | None]:
        _, found = self._metadata(reference, path, revision)
        if found.size is None:
            raise ModelUnavailable(f"{self._endpoint} names no size for {path!r}; is HF_ENDPOINT a Hugging Face Hub?")
        etag = found.etag or ""
        sha256 = etag if _SHA256.fullmatch(etag) else None  # a file not in LFS has a git blob id instead
        return RemoteFile(path, found.size, sha256, found.etag), found.commit_hash

    def _metadata(self, reference: HuggingFace, path: str, revision: str) -> tuple[str, HfFileMetadata]:
        """The file's URL at the hub, and what the hub answers to a HEAD of it."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        url = hf_hub_url(reference.repo_id, path, revision=revision, endpoint=self._endpoint)
        tries = 0
        while True:
            try:
                # Not retried by huggingface_hub: its five tries take 23 s, in which nothing can be cancelled.
                return url, get_hf_file_metadata(
                    url, token=self._token, library_name="slm-api-server", endpoint=self._endpoint
                )
            except OfflineModeIsEnabled as error:
                raise explain(error, reference, path, self._endpoint) from error
            except HTTPError as error:
                tries += 1
                if tries == HEAD_TRIES or not is_transient(error):
                    raise explain(error, reference, path, self._endpoint) from error
            time.sleep(self._pause(tries))

    def _get(self, url: str, partial: Partial, progress: Progress, cancelled: Cancelled) -> None:
        """One GET, written as it comes. Raises huggingface_hub's HTTPError, OSError of the disk, DownloadCancelled."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import hf_raise_for_status

        offset = partial.done
        headers = {**self._headers(), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        session = get_session()
        with session.stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if offset and not _continues(response, offset, partial.size):
                offset = 0
                partial.landed(0)
            try:
                for chunk in response.iter_bytes():
                    if cancelled():
                        raise DownloadCancelled
                    piece = memoryview(chunk)[: partial.size - offset]
                    while piece:
                        written = os.pwrite(partial.fd, piece, offset)
                        piece, offset = piece[written:], offset + written
                    if offset - partial.done >= _LANDED_EVERY:
                        partial.landed(offset)
                    progress(offset, partial.size)
            finally:
                with suppress(OSError):  # a full disk: the reason is already on its way
                    partial.landed(offset)

    def _pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return self._backoff_s * 2.0 ** (failures - 1) * random.uniform(0.5, 1)  # noqa: S311 - jitter


class _Origin:
    """An `Origin` of `adapters.transfer`: the address of one file, looked up once and again when it is refused."""

    etag: str | None = None  # the CDN's is of no account: the sha256 of the whole decides

    def __init__(self, hub: Hub, found: RemoteModel, file: RemoteFile) -> None:
        self.name = f"{file.path} of {found.reference}"
        self._hub, self._found, self._file = hub, found, file
        self._lock = threading.Lock()
        self._located: tuple[str, dict[str, str]] | None = None

    def request(self, first: int, last: int, *, renew: bool = False) -> tuple[str, dict[str, str]]:
        with self._lock:
            if renew or self._located is None:
                self._located = self._hub.locate(self._found, self._file)
            url, headers = self._located
        return url, {**headers, "Range": f"bytes={first}-{last}"}


def _continues(response: Any, offset: int, size: int) -> bool:
    """Whether the answer is the range that was asked for: a server or proxy may send the whole file instead."""
    if response.status_code != 206:
        return False
    given: str = response.headers.get("Content-Range", "")
    return given.startswith(f"bytes {offset}-") and given.endswith((f"/{size}", "/*"))


def _sleep(seconds: float, cancelled: Cancelled) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if cancelled():
            raise DownloadCancelled
        time.sleep(min(left, 0.1))
