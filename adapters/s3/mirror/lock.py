"""UploadLock: an object in S3 that says who uploads a blob, so that fifty cold starts upload it once.

It saves work and guards nothing: blobs are immutable and pointers are written conditionally, so two holders at once do
no harm. Times are S3's own (the object's Last-Modified against the answer's Date), so no two machines' clocks need
agree. Conditional writes: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

TTL_S = 600.0  # a holder that has not renewed for so long is gone


class LockLost(Exception):
    """Another process took the lock over: this one was silent for too long."""


def code(error: Any) -> str:
    """The error code in a botocore ClientError; S3 gives a bare number for a HEAD."""
    return str(error.response.get("Error", {}).get("Code", ""))


def refused(error: Any) -> bool:
    """Whether a condition of a write did not hold."""
    return code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def missing(error: Any) -> bool:
    return code(error) in ("NoSuchKey", "NotFound", "404")


def boot_time() -> float:
    """Seconds that also count while the machine is suspended; on Linux `time.monotonic()` stands still then."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True)
class _Held:
    """The lock object as it is. Whatever cannot be read belongs to nobody and leaves no note."""

    etag: str
    owner: str
    note: str
    age: float


class UploadLock:
    """`key` is the lock object. One thread uses it."""

    def __init__(
        self, client: S3Client, bucket: str, key: str, *, ttl: float = TTL_S, clock: Callable[[], float] = boot_time
    ) -> None:
        self._client, self._bucket, self._key, self._ttl, self._clock = client, bucket, key, ttl, clock
        self._owner = uuid.uuid4().hex
        self._serial = 0  # makes each write another object: equal bodies would have equal ETags
        self._etag: str | None = None
        self._written = 0.0

    def acquire(self) -> str | None:
        """The note that the last holder left ("" if there was none); None: another process holds it.

        Raises botocore's ClientError and BotoCoreError for anything else.
        """
        if self._write("", IfNoneMatch="*"):
            return ""
        held = self._read()
        if held is None or held.owner == self._owner or held.age < self._ttl:
            return None
        return held.note if self._write("", IfMatch=held.etag) else None

    def renew(self, note: str, *, always: bool = False) -> None:
        """Extend it, once a quarter of its time has gone, and leave a note for the next holder. Raises LockLost."""
        if not always and self._clock() - self._written < self._ttl / 4:
            return
        if self._etag is None or not self._write(note, IfMatch=self._etag):
            self._etag = None
            raise LockLost

    def release(self) -> None:
        """Give it back, if it is still this process's."""
        from botocore.exceptions import ClientError

        etag, self._etag = self._etag, None
        if etag is None or self._clock() - self._written > self._ttl / 2:
            return  # it may be another's soon: an S3 that ignores the condition would delete theirs
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._key, IfMatch=etag)
        except ClientError as error:
            if not refused(error) and not missing(error):
                raise

    def _write(self, note: str, **condition: Any) -> bool:
        """Whether the lock is now as written here. A refusal may be the answer to a repeated request whose first
        answer was lost: then the object is this very write."""
        from botocore.exceptions import ClientError

        self._serial += 1
        owner = f"{self._owner} {self._serial}"
        body = json.dumps({"owner": owner, "note": note}).encode()
        before = self._clock()
        try:
            etag = self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **condition)["ETag"]
        except ClientError as error:
            if not refused(error) and not missing(error):
                raise
            held = self._read()
            if held is None or held.owner != owner:
                return False
            etag = held.etag
        self._etag, self._written = etag, before
        return True

    def _read(self) -> _Held | None:
        from botocore.exceptions import ClientError

        try:
            reply = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if missing(error):
                return None
            raise
        try:
            fields = json.loads(reply["Body"].read(65536))
            owner, note = str(fields["owner"]), str(fields["note"])
        except (ValueError, KeyError, TypeError):
            owner = note = ""
        try:
            now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
            age = (now - reply["LastModified"]).total_seconds()
        except (ValueError, KeyError, TypeError):  # no date: believed to be held
            age = 0.0
        return _Held(reply["ETag"], owner, note, age)
