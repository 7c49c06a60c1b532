"""Lock the upload of a blob with an object in S3, so that fifty cold starts upload it once.

The lock only saves work: blobs are immutable and pointers are written conditionally, so two holders at once do no
harm. Ages are measured by S3's own clock (Last-Modified against the response's Date), so clocks need not agree.
Conditional writes: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html.
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

TTL_S = 600.0  # after this long without a renewal the lock may be taken over


class LockLost(Exception):
    """Another process took over the lock, because this one did not renew it in time."""


def code(error: Any) -> str:
    """Return the error code of a botocore ClientError. For a HEAD it is the bare status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def refused(error: Any) -> bool:
    """Return whether the condition of a write failed."""
    return code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def missing(error: Any) -> bool:
    return code(error) in ("NoSuchKey", "NotFound", "404")


def boot_time() -> float:
    """Return a monotonic time that includes suspension; on Linux `time.monotonic()` does not."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True)
class _Current:
    """The lock object in S3. If it cannot be parsed, owner and note are empty."""

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
        """Take the lock. Return the last holder's note ("" if there is none), or None if another process holds it.

        Raise botocore's ClientError or BotoCoreError for anything else.
        """
        if self._write("", IfNoneMatch="*"):
            return ""
        current = self._read()
        if current is None or current.owner == self._owner or current.age < self._ttl:
            return None
        return current.note if self._write("", IfMatch=current.etag) else None

    def renew(self, note: str, *, always: bool = False) -> None:
        """Renew the lock after a quarter of its time, with a note for the next holder. Raise LockLost."""
        if not always and self._clock() - self._written < self._ttl / 4:
            return
        if self._etag is None or not self._write(note, IfMatch=self._etag):
            self._etag = None
            raise LockLost

    def release(self) -> None:
        """Delete the lock, if this process still holds it."""
        from botocore.exceptions import ClientError

        etag, self._etag = self._etag, None
        if etag is None or self._clock() - self._written > self._ttl / 2:
            return  # it may be taken over soon, and an S3 without conditional deletes would delete the new one
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._key, IfMatch=etag)
        except ClientError as error:
            if not refused(error) and not missing(error):
                raise

    def _write(self, note: str, **condition: Any) -> bool:
        """Write the lock. Return whether it is now as written here.

        If botocore repeated a request whose response was lost, the repetition fails although the write succeeded.
        Then the object in S3 is this one.
        """
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
            current = self._read()
            if current is None or current.owner != owner:
                return False
            etag = current.etag
        self._etag, self._written = etag, before
        return True

    def _read(self) -> _Current | None:
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
        except (ValueError, KeyError, TypeError):  # without a date the lock counts as new
            age = 0.0
        return _Current(reply["ETag"], owner, note, age)
