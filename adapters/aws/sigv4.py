"""AWS Signature Version 4 on the standard library, for the requests of a cold start.

Why not botocore: importing boto3 and making a client costs about a second, and a GET needs forty lines of it.
Specification: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html; the tests
compare every header with botocore's own. Not covered: presigned URLs, chunked uploads, SigV4A.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"  # S3 only: the body is not covered by the signature

_PORTS = {"http": 80, "https": 443}
# Proxies change these, so the signature leaves them out (as botocore does).
_UNSIGNED = {
    "baggage",
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "x-amzn-trace-id",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who signs. `token` is the session token of temporary credentials; `expires` is in seconds since the epoch."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expires: float | None = None


def sign(
    method: str,
    url: str,
    headers: Mapping[str, str],
    payload_hash: str,
    credentials: Credentials,
    region: str,
    service: str,
    now: float | None = None,
) -> dict[str, str]:
    """`headers` and those that make the request a signed one; send exactly these, to exactly this `url`.

    `url` is already percent-encoded (`quote_key`, `quote_query`). `payload_hash` is the body's sha256 in hex,
    EMPTY_SHA256 without one, or for S3 UNSIGNED_PAYLOAD. `now` is in seconds since the epoch (default: the clock).
    """
    parts = urlsplit(url)
    timestamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    signed = {name.lower(): value for name, value in headers.items() if name.lower() != "authorization"}
    signed.setdefault("host", _host(parts.scheme, parts.hostname or "", parts.port))
    signed["x-amz-date"] = timestamp
    if service == "s3":
        signed["x-amz-content-sha256"] = payload_hash
    if credentials.token:
        signed["x-amz-security-token"] = credentials.token

    names = sorted(signed.keys() - _UNSIGNED)
    canonical = "\n".join(
        [
            method.upper(),
            # S3 signs the path as it is sent; every other service signs it normalised and encoded once more.
            (parts.path or "/") if service == "s3" else quote(_normalised(parts.path), safe="/~"),
            "&".join("=".join(pair) for pair in sorted(_pair(text) for text in parts.query.split("&") if parts.query)),
            *(f"{name}:{' '.join(signed[name].split())}" for name in names),
            "",
            ";".join(names),
            payload_hash,
        ]
    )
    scope = f"{timestamp[:8]}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{timestamp}\n{scope}\n{digest}".encode(), "sha256").hex()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}"
    )
    return signed


def quote_key(key: str) -> str:
    """An object key as a URL path, slashes kept: S3 keys are bytes, so "//", "." and "+" mean themselves."""
    return quote(key, safe="/~")


def quote_query(parameters: Mapping[str, str]) -> str:
    """A query string as SigV4 wants it: everything but unreserved characters encoded, a space as %20."""
    return "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(parameters.items()))


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _host(scheme: str, name: str, port: int | None) -> str:
    host = f"[{name}]" if ":" in name else name
    return host if port is None or port == _PORTS.get(scheme) else f"{host}:{port}"


def _normalised(path: str) -> str:
    """RFC 3986 section 5.2.4, and empty segments dropped."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            kept = kept[:-1]
        elif segment not in ("", "."):
            kept.append(segment)
    end = "/" if kept and path.endswith("/") else ""
    return "/" + "/".join(kept) + end
