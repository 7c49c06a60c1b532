"""Upload one file to the mirror in parts, over as many invocations as it takes. This uses boto3: no request waits.

The file is read once, so the uploaded bytes are the hashed ones, and the upload is completed only if their sha256 is
the blob's name. The completion is conditional, so a blob is written once. The manifest is written last, and replaces
only the one that was read before the blob, so it never names a version that its writer has not seen.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.s3.manifest import Manifest
from adapters.s3.mirror.lock import LockLost, UploadLock, code, refused
from adapters.transfer.transfer import BLOCK_BYTES
from core.store import gguf

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

PART_BYTES = 8 << 20  # S3 takes 5 MiB to 5 GiB; four in flight are 32 MiB
MAX_PARTS = 9000  # S3 takes 10,000
IN_FLIGHT = 4
TRIES = 4  # per part, on top of botocore's own
MARGIN_S = 1.0  # before a deadline


class UploadFailed(Exception):
    """The upload cannot succeed. The message is for the log."""


@dataclass(frozen=True, slots=True)
class Target:
    """The keys of a file in the mirror, and the versions that exist already."""

    blob: str  # the key of its bytes
    sha256: str  # in hex; the blob's name
    manifest: str  # the key of its manifest
    origin: str
    manifest_etag: str | None = None  # of the manifest to replace, read before the blob
    etag: str | None = None  # of the existing blob
    whole: bool = False  # the blob is complete and trusted: only the manifest is missing


class Upload:
    """`descriptor` is the open file; the caller closes it. One thread uses an upload."""

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        target: Target,
        descriptor: int,
        *,
        lock: UploadLock,
        progress: Callable[[int, int], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._bucket, self._target, self._lock = client, bucket, target, lock
        self._key = target.blob
        self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
        self._progress = progress or (lambda done, total: None)
        blocks = max(PART_BYTES, -(-self._size // MAX_PARTS)) / BLOCK_BYTES
        self._part_bytes = BLOCK_BYTES * -int(-blocks // 1)
        self._count = max(1, -(-self._size // self._part_bytes))
        self._stopped, self._clock = stopped, clock
        self._hash = hashlib.sha256()
        self._blocks: list[str] = []
        self._id: str | None = None
        self._next = 0  # the first part that is not read yet
        self._tries: dict[int, int] = {}
        self._etags: dict[int, str] = {}
        self._flying: dict[Future[str], int] = {}
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="upload")

    def begin(self, unfinished: str) -> None:
        """Call with the lock held. `unfinished` is its last holder's note: the id of an upload to abort, or empty."""
        from botocore.exceptions import ClientError

        if unfinished:
            with suppress(ClientError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=unfinished)
        if self._target.whole:
            return
        self._id = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key)["UploadId"]
        self._lock.renew(self._id, always=True)

    def advance(self, deadline: float | None) -> bool:
        """Upload until complete (return True), or until `deadline` is near or `stopped()` is true (return False).

        Raise LockLost, UploadFailed, or botocore's ClientError or BotoCoreError.
        """
        while len(self._etags) < self._count:
            if self._stopped() or self._short(deadline):
                return False
            self._lock.renew(self._id or "")
            while len(self._flying) < IN_FLIGHT and self._next < self._count:
                data = self._read(self._next, hashed=True)
                if self._target.whole:
                    self._etags[self._next] = ""
                else:
                    self._submit(self._next, data)
                self._next += 1
            timeout = 0.5 if deadline is None else min(0.5, deadline - self._clock() - MARGIN_S)
            landed, _ = wait(self._flying, timeout, FIRST_COMPLETED)
            for future in landed:
                self._collect(self._flying.pop(future), future)
            self._progress(min(self._size, len(self._etags) * self._part_bytes), self._size)
        if self._short(deadline, need=10.0):
            return False
        self._finish()
        return True

    def abandon(self) -> None:
        """Abort, so that nothing is left in S3 that costs money. Never raise."""
        from botocore.exceptions import BotoCoreError, ClientError

        self.close()
        with suppress(ClientError, BotoCoreError):
            if self._id is not None:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._id)
        with suppress(ClientError, BotoCoreError):
            self._lock.release()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _short(self, deadline: float | None, need: float = 3.0) -> bool:
        return deadline is not None and deadline - self._clock() < need + MARGIN_S

    def _read(self, part: int, *, hashed: bool) -> bytes:
        offset = part * self._part_bytes
        length = min(self._part_bytes, self._size - offset)
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise UploadFailed("the file was cut short while it was uploaded")
        if hashed:
            self._hash.update(data)
            view = memoryview(data)
            self._blocks += [
                hashlib.sha256(view[at : at + BLOCK_BYTES]).hexdigest() for at in range(0, length, BLOCK_BYTES)
            ]
        return data

    def _submit(self, part: int, data: bytes) -> None:
        def send() -> str:
            # S3 refuses a part with a wrong MD5. Every S3 server supports this header, but not newer checksums.
            md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
            return self._client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id or "",
                PartNumber=part + 1,
                Body=data,
                ContentMD5=md5,
            )["ETag"]

        self._flying[self._pool.submit(send)] = part

    def _collect(self, part: int, future: Future[str]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._etags[part] = future.result()
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and code(error) == "NoSuchUpload":
                raise LockLost from error  # the new holder of the lock has aborted it
            self._tries[part] = self._tries.get(part, 0) + 1
            if self._tries[part] >= TRIES:
                raise
            self._submit(part, self._read(part, hashed=False))

    def _finish(self) -> None:
        if (digest := self._hash.hexdigest()) != self._target.sha256:
            raise UploadFailed(f"the file has sha256 {digest}, expected {self._target.sha256}")
        try:
            header = gguf.parse_header(lambda offset, length: os.pread(self._descriptor, length, offset), self._size)
        except gguf.MalformedGGUF as error:
            raise UploadFailed(f"the file {error}") from error
        self._lock.renew(self._id or "", always=True)
        etag = self._target.etag if self._target.whole else self._complete()
        self._id = None
        self._write_manifest(
            Manifest(
                key=self._key,
                size_bytes=self._size,
                sha256=digest,
                etag=etag or "",
                header_bytes=header.data_offset,
                block_bytes=BLOCK_BYTES,
                blocks=tuple(self._blocks),
                origin=self._target.origin,
            )
        )
        self._lock.release()
        self.close()

    def _complete(self) -> str:
        """Complete the blob and return its ETag. Another uploader may have completed it first."""
        from botocore.exceptions import ClientError

        parts: Any = [{"PartNumber": part + 1, "ETag": self._etags[part]} for part in range(self._count)]
        replaced = self._target.etag
        condition: Any = {"IfNoneMatch": "*"} if replaced is None else {"IfMatch": replaced}
        try:
            completed = self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id or "",
                MultipartUpload={"Parts": parts},
                **condition,
            )
        except ClientError as error:
            if not refused(error) and code(error) != "NoSuchUpload":
                raise
            # Another uploader was first, or botocore repeated the request. The same name means the same bytes.
            with suppress(ClientError):
                stored = self._client.head_object(Bucket=self._bucket, Key=self._key)
                if stored["ContentLength"] == self._size and stored["ETag"] != replaced:
                    return stored["ETag"]
            raise LockLost from error
        return completed["ETag"]

    def _write_manifest(self, manifest: Manifest) -> None:
        from botocore.exceptions import ClientError

        before = self._target.manifest_etag
        condition: Any = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before}
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._target.manifest,
                Body=manifest.to_json(),
                ContentType="application/json",
                **condition,
            )
        except ClientError as error:
            if refused(error) or code(error) in ("NoSuchKey", "404"):
                raise LockLost from error  # another uploader has written it: look it up again
            raise
