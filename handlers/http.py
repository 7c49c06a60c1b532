"""Request and Response, their JSON bodies, and the context of one request.

The context is the request's id and the extra fields of its access-log line.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from core.errors import InvalidRequest
from handlers.validation import explain

T = TypeVar("T")


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


def decode(request: Request, kind: type[T]) -> T:
    """Return the body as `kind`, a msgspec Struct. Decoding is strict: "5" is not accepted as 5.

    Unknown fields are ignored unless `kind` has `forbid_unknown_fields`. Raises InvalidRequest. Its message says what
    was given and what is allowed, and its `param` is the path of the field.
    """
    if not request.body.strip():
        raise InvalidRequest("The body is empty; send a JSON object.")
    try:
        return msgspec.json.decode(request.body, type=kind)
    except msgspec.ValidationError as error:
        raise explain(str(error), request.body, kind) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {_syntax(str(error))}") from None


def json_response(value: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """Return a response with `value` (structs, dicts, lists) as JSON."""
    return Response(status, (("content-type", "application/json"), *headers), msgspec.json.encode(value))


def _syntax(message: str) -> str:
    """Return msgspec's message about a syntax error. It has fixed texts and byte offsets, nothing from the body."""
    text = message.removeprefix("JSON is malformed: ")
    return (text[:1].lower() + text[1:]).rstrip(".") + "."


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
