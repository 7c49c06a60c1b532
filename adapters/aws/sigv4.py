"""Sign requests with AWS Signature Version 4, on the standard library.

Importing boto3 and making a client takes about a second of a cold start. Specification:
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html; the tests compare every
header with botocore's. Not covered: presigned URLs, chunked uploads, SigV4A.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

_PORTS = {"http": 80, "https": 443}
# Proxies change these headers, so they are not signed, as in botocore.
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
    """An access key. `token` is the session token of temporary credentials, `expires` is in seconds since the epoch."""

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
    """Return `headers` and the headers of the signature. Send exactly these, to exactly this `url`.

    `url` must be percent-encoded (`quote_key`). `payload_hash` is the body's sha256 in hex, or EMPTY_SHA256 without a
    body. `now` is in seconds since the epoch (default: the clock).
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
            # S3 signs the path as it is sent. Every other service signs it normalised and encoded once more.
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
    """Return an object key as a URL path with its slashes. S3 does not normalise keys: "//", "." and "+" stay."""
    return quote(key, safe="/~")


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _host(scheme: str, name: str, port: int | None) -> str:
    host = f"[{name}]" if ":" in name else name
    return host if port is None or port == _PORTS.get(scheme) else f"{host}:{port}"


def _normalised(path: str) -> str:
    """Remove dot segments (RFC 3986 section 5.2.4) and empty segments."""
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            segments = segments[:-1]
        elif segment not in ("", "."):
            segments.append(segment)
    end = "/" if segments and path.endswith("/") else ""
    return "/" + "/".join(segments) + end
