"""Download models from Hugging Face with huggingface_hub's session, headers and errors.

huggingface_hub handles the token, the endpoint, HF_HOME, HF_HUB_OFFLINE and error codes. Its cache is not used, so a
model is on the disk once. Its `http_get` is not used either: it yields 10 MiB at a time, too rarely for progress and
cancellation. Files stored in Xet are downloaded over its HTTP bridge.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from adapters.huggingface.errors import explain, is_temporary
from adapters.transfer.retry import Backoff, RetryPolicy, sleep
from core.errors import ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace, split_files
from core.store.source import Cancelled, DownloadCancelled, Partial, Progress, RemoteFile, RemoteModel, never

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfFileMetadata

logger = logging.getLogger("slm.huggingface")

POLICY = RetryPolicy(attempts=5, backoff=Backoff(0.5, 8.0))
HEAD_ATTEMPTS = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LANDED_EVERY = 1 << 20


class Hub:
    """A Source for hf:// references. Without `token` it uses huggingface_hub's (HF_TOKEN or saved in HF_HOME)."""

    name = "huggingface"
    authority = True

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        *,
        threads: int = 0,
        part_bytes: int = 0,
        policy: RetryPolicy = POLICY,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._threads = threads or 4
        self._part_bytes = part_bytes or 8 << 20
        self._policy = policy

    def resolve(
        self, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled = never
    ) -> RemoteModel | None:
        """Look up commit, size and sha256 of each file, with one HEAD each.

        Raise ModelNotFound, InvalidRequest (gated, disabled, token refused), ModelUnavailable or DownloadCancelled.
        """
        if not isinstance(reference, HuggingFace):
            return None
        files: list[RemoteFile] = []
        commit: str | None = None
        resolved_at = time.time()
        for path in split_files(reference.filename):
            file, commit = self._head(reference, path, commit or reference.revision, cancelled)
            files.append(file)
        return RemoteModel(self.name, reference, tuple(files), commit, resolved_at)

    def download(
        self, remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """Download with one GET, and resume after each break until the file is complete. The store verifies it."""
        from huggingface_hub.errors import HTTPError

        assert isinstance(remote.reference, HuggingFace)
        url = self._url(remote, file)
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
            if failures >= self._policy.attempts or not is_temporary(failure):
                raise explain(failure, remote.reference, file.path, self._endpoint) from failure
            logger.info("%s broke off at %d of %d bytes; resuming", file.path, partial.done, partial.size)
            sleep(self._policy.backoff.pause(failures), cancelled)
        return False

    def open_memory(
        self, remote: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """Download with parallel ranged reads. Return once all is verified: there is one sha256, for the whole."""
        from adapters.transfer import memfd
        from adapters.transfer.checksum import Sha256
        from adapters.transfer.transfer import Transfer

        file = remote.files[0]
        expected = next(iter(remote.reference.sha256), file.sha256)
        if expected is None:
            return None
        origin, checksum = _Origin(self, remote, file), Sha256(expected)

        def begin(fd: int) -> Transfer:
            return Transfer(
                origin,
                fd,
                file.size_bytes,
                checksum=checksum,
                threads=self._threads,
                part_bytes=self._part_bytes,
                policy=self._policy,
            )

        return memfd.receive(remote, begin, name, progress, cancelled, whole=True)

    def locate(self, remote: RemoteModel, file: RemoteFile) -> tuple[str, dict[str, str]]:
        """Follow Hugging Face's redirect. Return a URL and headers with which any HTTP client can read the file.

        The URL is signed and expires. The token is only sent to Hugging Face's own host. Raise what `resolve` raises.
        """
        assert isinstance(remote.reference, HuggingFace)
        url, metadata = self._metadata(remote.reference, file.path, remote.commit or remote.reference.revision, never)
        location = urljoin(url, metadata.location)
        same = urlsplit(location)[:2] == urlsplit(url)[:2]
        return location, dict(self._headers()) if same else {}

    def _url(self, remote: RemoteModel, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        assert isinstance(remote.reference, HuggingFace)
        revision = remote.commit or remote.reference.revision
        return hf_hub_url(remote.reference.repo_id, file.path, revision=revision, endpoint=self._endpoint)

    def _headers(self) -> Mapping[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self._token, library_name="slm-api-server")

    def _head(
        self, reference: HuggingFace, path: str, revision: str, cancelled: Cancelled
    ) -> tuple[RemoteFile, str | None]:
        _, metadata = self._metadata(reference, path, revision, cancelled)
        if metadata.size is None:
            raise ModelUnavailable(f"{self._endpoint} names no size for {path!r}. Check HF_ENDPOINT.")
        etag = metadata.etag or ""
        sha256 = etag if _SHA256.fullmatch(etag) else None  # a file that is not in LFS has a git blob id instead
        return RemoteFile(path, metadata.size, sha256, metadata.etag), metadata.commit_hash

    def _metadata(
        self, reference: HuggingFace, path: str, revision: str, cancelled: Cancelled
    ) -> tuple[str, HfFileMetadata]:
        """Return the file's URL at Hugging Face, and the answer to a HEAD of it."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        url = hf_hub_url(reference.repo_id, path, revision=revision, endpoint=self._endpoint)
        failures = 0
        while True:
            try:
                # Without retries by huggingface_hub: its five take 23 s and cannot be cancelled.
                return url, get_hf_file_metadata(
                    url, token=self._token, library_name="slm-api-server", endpoint=self._endpoint
                )
            except OfflineModeIsEnabled as error:
                raise explain(error, reference, path, self._endpoint) from error
            except HTTPError as error:
                failures += 1
                if failures == HEAD_ATTEMPTS or not is_temporary(error):
                    raise explain(error, reference, path, self._endpoint) from error
            sleep(self._policy.backoff.pause(failures), cancelled)

    def _get(self, url: str, partial: Partial, progress: Progress, cancelled: Cancelled) -> None:
        """Write the body of one GET. Raise huggingface_hub's HTTPError, OSError (disk) or DownloadCancelled."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import hf_raise_for_status

        offset = partial.done
        headers = {**self._headers(), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        session = get_session()
        timeout = min(self._policy.stall_s, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
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
                with suppress(OSError):  # disk full: that error is being raised already
                    partial.landed(offset)


class _Origin:
    """One file as an `Origin`. Its address is looked up once, and again when it is refused."""

    etag: str | None = None  # the CDN's ETag is ignored: the sha256 of the whole decides

    def __init__(self, hub: Hub, remote: RemoteModel, file: RemoteFile) -> None:
        self.name = f"{file.path} of {remote.reference}"
        self._hub, self._remote, self._file = hub, remote, file
        self._lock = threading.Lock()
        self._located: tuple[str, dict[str, str]] | None = None

    def request(self, first: int, last: int, *, renew: bool = False) -> tuple[str, dict[str, str]]:
        with self._lock:
            if renew or self._located is None:
                self._located = self._hub.locate(self._remote, self._file)
            url, headers = self._located
        return url, {**headers, "Range": f"bytes={first}-{last}"}


def _continues(response: Any, offset: int, size: int) -> bool:
    """Return whether the response is the requested range. A server or proxy may send the whole file instead."""
    content_range: str = response.headers.get("Content-Range", "")
    return response.status_code == 206 and content_range == f"bytes {offset}-{size - 1}/{size}"
