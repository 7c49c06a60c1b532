"""Bucket: the reading half of S3 that a cold start needs, without boto3: small objects, heads, ranges.

Speaks to AWS (virtual-hosted addresses) and to MinIO and its kind (S3_ENDPOINT_URL, path-style addresses), finds a
bucket's region when it was told a wrong one, and has new credentials when the old ones have expired.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.aws.credentials import CredentialChain
from adapters.aws.sigv4 import EMPTY_SHA256, Credentials, quote_key, sign
from adapters.transfer.connection import Connection, ConnectionBroken
from core.errors import ModelUnavailable

ATTEMPTS = 5
TIMEOUT_S = 5.0
IDLE_S = 5.0  # a connection that has rested longer is not used again
FIRST_PAUSE_S = 0.2

logger = logging.getLogger("slm.s3")


class Denied(ModelUnavailable):
    """S3 says 403: no right to read, or no such key and no right to list the bucket. It does not say which."""


@dataclass(frozen=True, slots=True)
class S3Response:
    """S3's answer: a status of 2xx or 404, headers with lower-case names, the body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Bucket:
    """One bucket, for reading. Thread-safe; keeps idle connections for the next request."""

    def __init__(
        self,
        name: str,
        *,
        credentials: CredentialChain,
        endpoint_url: str | None = None,
        region: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.name = name
        self._chain = credentials
        self._endpoint = endpoint_url.rstrip("/") if endpoint_url else None
        self._region = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._lock = threading.Lock()
        self._idle: list[tuple[Connection, float]] = []  # and since when, by the wall clock

    def url(self, key: str) -> str:
        path = quote_key(key)
        if self._endpoint:
            return f"{self._endpoint}/{self.name}/{path}"
        domain = "amazonaws.com.cn" if self._region.startswith("cn-") else "amazonaws.com"
        if "." in self.name:  # the wildcard certificate has one level only
            return f"https://s3.{self._region}.{domain}/{self.name}/{path}"
        return f"https://{self.name}.s3.{self._region}.{domain}/{path}"

    def get(self, key: str, *, most: int = 16 << 20) -> S3Response | None:
        """A small object, None if there is none. Raises Denied or ModelUnavailable."""
        return self._read("GET", key, {}, most)

    def head(self, key: str) -> S3Response | None:
        """An object's headers, its checksums among them; None if there is none. Raises Denied or ModelUnavailable."""
        return self._read("HEAD", key, {"x-amz-checksum-mode": "ENABLED"}, 0)

    def origin(self, key: str, etag: str) -> ObjectOrigin:
        """Where a `Transfer` reads the version of an object that has this ETag."""
        return ObjectOrigin(self, key, etag)

    def signed(
        self, method: str, key: str, headers: Mapping[str, str], *, stale: Credentials | None = None
    ) -> tuple[str, dict[str, str], Credentials]:
        """URL and headers of a request, and whose credentials they are."""
        url = self.url(key)
        credentials = self._chain.get(stale=stale)
        return url, sign(method, url, headers, EMPTY_SHA256, credentials, self._region, "s3"), credentials

    def _read(self, method: str, key: str, headers: Mapping[str, str], most: int) -> S3Response | None:
        where, stale, moves = f"s3://{self.name}/{key}", None, 0
        while True:  # at most thrice: as configured, in the bucket's region, with new credentials
            reply, credentials = self._persist(method, key, headers, most, stale)
            reason = _reason(reply)
            if reply.status < 300:
                return reply
            if reply.status == 404:
                if "NoSuchBucket" in reason:
                    raise ModelUnavailable(f"There is no bucket {self.name!r}; check S3_BUCKET.", retry_after=None)
                return None
            if moves == 0 and self._moved(reply):
                moves += 1
                continue
            if reply.status not in (400, 401, 403):
                raise ModelUnavailable(f"{where} could not be read ({reason}). Try again later.")
            if stale is not None:
                raise Denied(f"{where} may not be read ({reason}): check the credentials and s3:GetObject.")
            stale = credentials

    def _persist(
        self, method: str, key: str, headers: Mapping[str, str], most: int, stale: Credentials | None
    ) -> tuple[S3Response, Credentials]:
        """The first answer that is not a passing trouble; after ATTEMPTS of those ModelUnavailable."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                pause = min(2.0, FIRST_PAUSE_S * 2 ** (attempt - 1))
                time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter, no secret
            url, signed, credentials = self.signed(method, key, headers, stale=stale)
            try:
                reply = self._exchange(method, url, signed, most)
            except ConnectionBroken as error:
                reason = str(error)
                continue
            if reply.status < 500 and reply.status != 429:
                return reply, credentials
            reason = _reason(reply)
        logger.warning("s3://%s/%s: %s", self.name, key, reason)
        raise ModelUnavailable(f"s3://{self.name}/{key} could not be read in {ATTEMPTS} tries. Try again later.")

    def _moved(self, reply: S3Response) -> bool:
        """Whether S3 names another region for the bucket than the one asked; it is used from now on."""
        region = reply.headers.get("x-amz-bucket-region", self._region)
        if region == self._region or self._endpoint:
            return False
        logger.info("bucket %s is in %s, not in %s", self.name, region, self._region)
        self._region = region
        return True

    def _exchange(self, method: str, url: str, headers: Mapping[str, str], most: int) -> S3Response:
        connection = self._kept() or Connection(TIMEOUT_S)
        try:
            response = connection.send(method, url, headers)
            body = connection.read(most if response.status < 300 else 65536)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append((connection, time.time()))
        return S3Response(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def _kept(self) -> Connection | None:
        """The connection that was used last, if S3 is likely to have kept it, too.

        By the wall clock: a process that was frozen, or restored from a snapshot, holds sockets that lead nowhere, and
        the first request on one would wait for its timeout.
        """
        with self._lock:
            if not self._idle:
                return None
            connection, since = self._idle.pop()
        if 0 <= time.time() - since <= IDLE_S:
            return connection
        connection.close()
        self.close()  # the others have rested longer
        return None

    def close(self) -> None:
        """Close idle connections; later requests open new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()


def _reason(reply: S3Response) -> str:
    code = re.search(rb"<Code>(\w{1,64})</Code>", reply.body)
    return f"HTTP {reply.status}" + (f" {code[1].decode()}" if code else "")


class ObjectOrigin:
    """One version of one object, as a `Transfer` reads it: each request is signed anew and pinned to the ETag."""

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
