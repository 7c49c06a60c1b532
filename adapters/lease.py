"""Lease: an object in S3 that says who does a piece of work. Conditional writes make sure that there is one holder.

Times are S3's own (the object's Last-Modified against the answer's Date), so no two machines' clocks need agree.
Conditional writes: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html; MinIO has them too.
"""

from __future__ import annotations

import json
import time
import uuid
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

TTL_S = 600.0  # a holder that has not renewed for so long is gone


class LeaseLost(Exception):
    """Somebody took the lease over: we were silent for too long."""


def code(error: Any) -> str:
    """The error code in a botocore ClientError; S3 gives a bare number for a HEAD."""
    return str(error.response.get("Error", {}).get("Code", ""))


def refused(error: Any) -> bool:
    """Whether a condition of a write did not hold."""
    return code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


class Lease:
    """`key` is the lease object. One thread uses it."""

    def __init__(self, client: S3Client, bucket: str, key: str, *, ttl: float = TTL_S) -> None:
        self._client, self._bucket, self._key, self._ttl = client, bucket, key, ttl
        self._owner = uuid.uuid4().hex
        self._etag: str | None = None
        self._written = 0.0

    def acquire(self) -> str | None:
        """The note that the last holder left ("" if there was none); None: somebody else holds it.

        Raises botocore's ClientError and BotoCoreError for anything else.
        """
        from botocore.exceptions import ClientError

        try:
            self._write("", IfNoneMatch="*")
        except ClientError as error:
            if not refused(error):
                raise
        else:
            return ""
        try:
            held = self._client.get_object(Bucket=self._bucket, Key=self._key)
            note = json.loads(held["Body"].read(65536)).get("note", "")
            now = parsedate_to_datetime(held["ResponseMetadata"]["HTTPHeaders"]["date"])
            if (now - held["LastModified"]).total_seconds() < self._ttl:
                return None
            self._write("", IfMatch=held["ETag"])
        except ClientError as error:
            if refused(error) or code(error) in ("NoSuchKey", "404"):
                return None  # somebody was faster, or the holder has just finished
            raise
        return str(note)

    def renew(self, note: str, *, always: bool = False) -> None:
        """Extend it, once a quarter of its time has gone, and leave a note for who comes after. Raises LeaseLost."""
        from botocore.exceptions import ClientError

        if not always and time.monotonic() - self._written < self._ttl / 4:
            return
        if self._etag is None:
            raise LeaseLost
        try:
            self._write(note, IfMatch=self._etag)
        except ClientError as error:
            if refused(error) or code(error) in ("NoSuchKey", "404"):
                self._etag = None
                raise LeaseLost from error
            raise

    def release(self) -> None:
        """Give it back, unless somebody else may hold it by now."""
        if self._etag is not None and time.monotonic() - self._written < self._ttl / 2:
            self._client.delete_object(Bucket=self._bucket, Key=self._key)
        self._etag = None

    def _write(self, note: str, **condition: Any) -> None:
        body = json.dumps({"owner": self._owner, "note": note}).encode()
        before = time.monotonic()
        self._etag = self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **condition)["ETag"]
        self._written = before
