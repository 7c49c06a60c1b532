"""Read from S3 without boto3: small objects, headers and ranges, as a cold start needs them.

Works with AWS (virtual-hosted addresses) and with MinIO and similar servers (S3_ENDPOINT_URL, path-style addresses).
Follows a bucket to its region, and renews credentials that have expired.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.aws.credentials import CredentialChain
from adapters.aws.sigv4 import EMPTY_SHA256, Credentials, quote_key, sign
from adapters.transfer.connection import Connection, ConnectionBroken
from adapters.transfer.errors import MAX_ERROR_BODY, reason_of
from adapters.transfer.retry import Backoff, is_transient, sleep
from core.errors import ModelUnavailable
from core.store.source import Cancelled, never

ATTEMPTS = 5
TIMEOUT_S = 5.0
IDLE_S = 5.0  # a connection that was idle for longer is not reused
BACKOFF = Backoff(0.2, 2.0)

logger = logging.getLogger("slm.s3")


class Denied(ModelUnavailable):
    """S3 answered 403: no permission to read, or no such key and no permission to list the bucket."""


@dataclass(frozen=True, slots=True)
class S3Response:
    """A response of S3. Header names are lower-case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Bucket:
    """One bucket, for reading. Thread-safe. Idle connections are reused."""

    def __init__(
        self,
        name: str,
        *,
        credentials: CredentialChain,
        endpoint_url: str | None = None,
        region: str | None = None,
        environ: Mapping[str, str] = os.environ,
        backoff: Backoff = BACKOFF,
    ) -> None:
        self.name = name
        self._backoff = backoff
        self._chain = credentials
        self._endpoint = endpoint_url.rstrip("/") if endpoint_url else None
        self._region = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._lock = threading.Lock()
        self._idle: list[tuple[Connection, float]] = []  # and since when it is idle, by the wall clock

    def url(self, key: str) -> str:
        path = quote_key(key)
        if self._endpoint:
            return f"{self._endpoint}/{self.name}/{path}"
        domain = "amazonaws.com.cn" if self._region.startswith("cn-") else "amazonaws.com"
        if "." in self.name:  # the wildcard certificate covers one level only
            return f"https://s3.{self._region}.{domain}/{self.name}/{path}"
        return f"https://{self.name}.s3.{self._region}.{domain}/{path}"

    def get(self, key: str, *, most: int = 16 << 20, cancelled: Cancelled = never) -> S3Response | None:
        """Return a small object, or None if it does not exist. Raise Denied, ModelUnavailable or DownloadCancelled."""
        return self._read("GET", key, {}, most, cancelled)

    def head(self, key: str, *, cancelled: Cancelled = never) -> S3Response | None:
        """Return an object's headers with its checksums, or None if it does not exist. Raise what `get` raises."""
        return self._read("HEAD", key, {"x-amz-checksum-mode": "ENABLED"}, 0, cancelled)

    def origin(self, key: str, etag: str) -> ObjectOrigin:
        """Return the origin from which a `Transfer` reads the version with this ETag."""
        return ObjectOrigin(self, key, etag)

    def signed(
        self, method: str, key: str, headers: Mapping[str, str], *, stale: Credentials | None = None
    ) -> tuple[str, dict[str, str], Credentials]:
        """Return URL and headers of a request, and the credentials that signed it."""
        url = self.url(key)
        credentials = self._chain.get(stale=stale)
        return url, sign(method, url, headers, EMPTY_SHA256, credentials, self._region, "s3"), credentials

    def _read(
        self, method: str, key: str, headers: Mapping[str, str], most: int, cancelled: Cancelled
    ) -> S3Response | None:
        where, stale, moves = f"s3://{self.name}/{key}", None, 0
        while True:  # at most three rounds: as configured, in the bucket's region, with new credentials
            # 1) A final response, after retries.
            response, credentials = self._retry(method, key, headers, most, stale, cancelled)
            reason = reason_of(response.status, response.body)
            if response.status < 300:
                return response
            if response.status == 404:
                if "NoSuchBucket" in reason:
                    raise ModelUnavailable(f"There is no bucket {self.name!r}; check S3_BUCKET.", retry_after=None)
                return None
            # 2) Another region: once.
            if moves == 0 and self._moved(response):
                moves += 1
                continue
            if response.status not in (400, 401, 403):
                raise ModelUnavailable(f"{where} could not be read ({reason}). Try again later.")
            # 3) New credentials: once.
            if stale is not None:
                raise Denied(f"{where} may not be read ({reason}): check the credentials and s3:GetObject.")
            stale = credentials

    def _retry(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        most: int,
        stale: Credentials | None,
        cancelled: Cancelled,
    ) -> tuple[S3Response, Credentials]:
        """Return the first response that is not a transient failure. Raise ModelUnavailable after ATTEMPTS of them."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                sleep(self._backoff.pause(attempt), cancelled)
            url, signed, credentials = self.signed(method, key, headers, stale=stale)
            try:
                response = self._exchange(method, url, signed, most)
            except ConnectionBroken as error:
                reason = str(error)
                continue
            if not is_transient(response.status):
                return response, credentials
            reason = reason_of(response.status, response.body)
        logger.warning("s3://%s/%s: %s", self.name, key, reason)
        raise ModelUnavailable(f"s3://{self.name}/{key} could not be read in {ATTEMPTS} tries. Try again later.")

    def _moved(self, response: S3Response) -> bool:
        """Return whether S3 names another region for the bucket. It is used from now on."""
        region = response.headers.get("x-amz-bucket-region", self._region)
        if region == self._region or self._endpoint:
            return False
        logger.info("bucket %s is in %s, not in %s", self.name, region, self._region)
        self._region = region
        return True

    def _exchange(self, method: str, url: str, headers: Mapping[str, str], most: int) -> S3Response:
        connection = self._idle_connection() or Connection(TIMEOUT_S)
        try:
            response = connection.send(method, url, headers)
            body = connection.read(most if response.status < 300 else MAX_ERROR_BODY)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append((connection, time.time()))
        return S3Response(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def _idle_connection(self) -> Connection | None:
        """Return the connection that was used last, if S3 is likely to have kept it open.

        Measured by the wall clock: the sockets of a process that was frozen, or restored from a snapshot, are dead,
        and the first request on one would wait for its timeout.
        """
        with self._lock:
            if not self._idle:
                return None
            connection, since = self._idle.pop()
        if 0 <= time.time() - since <= IDLE_S:
            return connection
        connection.close()
        self.close()  # the others were idle for longer
        return None

    def close(self) -> None:
        """Close the idle connections. Later requests open new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()


class ObjectOrigin:
    """One version of one object. Each request of a `Transfer` is signed anew and pinned to the ETag."""

    def __init__(self, bucket: Bucket, key: str, etag: str) -> None:
        self.name = f"s3://{bucket.name}/{key}"
        self._bucket, self._key = bucket, key
        self._etag = etag
        self.etag: str | None = etag
        self._used: Credentials | None = None

    def request(self, first: int, last: int, *, renew: bool = False) -> tuple[str, dict[str, str]]:
        url, headers, self._used = self._bucket.signed(
            "GET",
            self._key,
            {"Range": f"bytes={first}-{last}", "If-Match": self._etag},
            stale=self._used if renew else None,
        )
        return url, headers
