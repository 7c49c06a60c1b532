"""Prelude: status and headers as the JSON that opens a streamed answer, followed by eight NULs.

Source: `application/vnd.awslambda.http-integration-response` as Amazon's Node.js and Rust runtimes send it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

SEPARATOR = b"\0" * 8
CONTENT_TYPE = "application/vnd.awslambda.http-integration-response"
DEFAULT_CONTENT_TYPE = "application/octet-stream"

# RFC 9110 section 7.6.1, and content-length: the platform frames the body itself and would send a second one
# (function URLs rename ours to x-amzn-remapped-content-length).
_DROPPED = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_FORBIDDEN = (b"\r", b"\n", b"\0")

RawHeaders = list[tuple[bytes, bytes]]


def checked(headers: Iterable[Iterable[bytes]]) -> RawHeaders:
    """What an answer may carry: lower-case names, hop-by-hop ones dropped. Raises ValueError at CR, LF or NUL."""
    kept: RawHeaders = []
    for pair in headers:
        name, value = pair
        name = bytes(name).lower()
        value = bytes(value)
        if any(mark in name or mark in value for mark in _FORBIDDEN) or not name:
            raise ValueError(f"header {name!r} holds a line break or a NUL, or has no name")
        if name not in _DROPPED:
            kept.append((name, value))
    return kept


def has_body(method: str, status: int) -> bool:
    """Whether an answer may have a body (RFC 9110 section 6.4.1)."""
    return method != "HEAD" and status >= 200 and status not in (204, 304)


def prelude(status: int, headers: RawHeaders, *, body: bool = True) -> bytes:
    """The prelude of an answer with `checked` headers; `body` False: there is none, so it needs no type."""
    named, cookies = joined(headers)
    if body:
        named.setdefault("content-type", DEFAULT_CONTENT_TYPE)
    record: dict[str, Any] = {"statusCode": status, "headers": named}
    if cookies:
        record["cookies"] = cookies
    return json.dumps(record, separators=(",", ":")).encode() + SEPARATOR


def joined(headers: RawHeaders) -> tuple[dict[str, str], list[str]]:
    """Headers by name, repeated ones joined by commas; cookies, which cannot be joined, apart."""
    named: dict[str, str] = {}
    cookies: list[str] = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name == "set-cookie":
            cookies.append(value)
        else:
            named[name] = f"{named[name]}, {value}" if name in named else value
    return named, cookies
