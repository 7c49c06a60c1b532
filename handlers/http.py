"""Request, Response and the context of one request: its id and the extra fields of its access-log line."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Request:
    """One complete request. The adapter has already read the body and enforced its limit.

    `headers` has lower-case names; values of repeated headers are joined with ", ". `query` holds the last of repeated
    keys. `deadline` is on the clock of `time.monotonic()`; the response must be complete by then. `client` is the
    peer's address, or None if the platform hides it. `direct` marks a direct Lambda invoke, which IAM has authorized.
    `principal` is the ARN of the IAM identity that signed an HTTP request, if the platform provides it.
    """

    method: str
    path: str
    id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client: str | None = None
    deadline: float | None = None
    http_version: str = "1.1"
    direct: bool = False
    principal: str | None = None


async def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Response:
    """Status, headers and a body, either bytes or an iterator of chunks.

    The sender calls `aclose()` in a `finally`, whether or not it has sent the body. A generator's own `finally` may
    never run once a framework drops it, so `aclose` frees what a stream owns (a lease, a running generation).
    `aclose()` may be called more than once.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | AsyncIterator[bytes] = b""
    aclose: Callable[[], Awaitable[None]] = _nothing


request_id: ContextVar[str] = ContextVar("request_id", default="")

# Platform ids for each log line, e.g. `requestId` and `xray_trace_id` on Lambda. None outside a platform.
platform: ContextVar[dict[str, str] | None] = ContextVar("platform", default=None)

_log_fields: ContextVar[dict[str, object] | None] = ContextVar("log_fields", default=None)

# A client's id is echoed in headers and logs, so it must not break a line or fill a disk.
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def identify(client_id: str | None) -> str:
    """Return the client's request id if it is safe to echo, otherwise a new one."""
    if client_id is not None and _SAFE_ID.fullmatch(client_id):
        return client_id
    return "req_" + os.urandom(12).hex()


def collect_log_fields() -> dict[str, object]:
    """Start the extra fields of one request's access-log line.

    Call it in the task that runs `dispatch` and sends the response.
    """
    fields: dict[str, object] = {}
    _log_fields.set(fields)
    return fields


def add_log_fields(**fields: object) -> None:
    """Add fields to this request's access-log line, e.g. `add_log_fields(model=..., prompt_tokens=...)`.

    Works in the handler and in the body of a stream. Never pass secrets or text from a client.
    """
    collected = _log_fields.get()
    if collected is not None:
        collected.update(fields)
