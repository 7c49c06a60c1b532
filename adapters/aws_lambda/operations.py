"""Direct invokes, for Step Functions, the AWS CLI and SDKs: `{"operation": "extract", ...body}`, guarded by IAM.

An operation is its route, called by a user, or by an administrator where DIRECT_ADMIN=true. The answer is plain JSON
without an envelope. An error is a function error (`Function.ModelUnavailable`, ...) with a client's message, so that a
state machine can retry or catch it.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from adapters.aws_lambda.failure import Failure

OPERATIONS = {
    "health": ("GET", "/health"),
    "models": ("GET", "/models"),
    "load": ("POST", "/load"),
    "reload": ("POST", "/reload"),
    "chat": ("POST", "/v1/chat/completions"),
    "extract": ("POST", "/v1/extract"),
}


class UnknownEvent(ValueError):
    """Nothing that this function serves. The message says what it does serve."""


def to_request(event: Any) -> tuple[dict[str, Any], bytes]:
    """The ASGI scope and body of an operation. Raises UnknownEvent."""
    if not isinstance(event, dict) or "operation" not in event:
        raise UnknownEvent(f"This function serves HTTP events and {_form()}; got {_shape(event)}.")
    fields = dict(event)
    operation = fields.pop("operation")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise UnknownEvent(f"There is no operation {str(operation)[:80]!r}; this function serves {_form()}.")
    if fields.get("stream"):
        raise UnknownEvent("A direct invoke answers with one JSON document: leave 'stream' out.")
    method, path = OPERATIONS[operation]
    body = json.dumps(fields).encode() if method == "POST" else b""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": urlencode(fields).encode() if method == "GET" else b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))] if body else [],
        "server": ("localhost", None),
        "client": None,
    }
    return scope, body


def failure(status: int, body: bytes) -> Failure:
    """An answer of 400 and over as a function error, typed by its code."""
    try:
        told = json.loads(body)["error"]
        name, message = str(told["code"] or told["type"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        name, message = "error", f"The operation ended with status {status}."
    kind = "".join(part.capitalize() for part in name.split("_") if part.isascii() and part.isalpha())
    return Failure(f"Function.{kind or 'Error'}", message)


def _form() -> str:
    return f'{{"operation": {" | ".join(OPERATIONS)}, ...}}'


def _shape(event: Any) -> str:
    """What kind of event it is, by its keys alone."""
    if not isinstance(event, dict):
        return f"a JSON {type(event).__name__}"
    records = event.get("Records")
    if isinstance(records, list) and records and isinstance(records[0], dict):
        source = records[0].get("eventSource") or records[0].get("EventSource") or "unknown source"
        return f"records of {str(source)[:40]}"
    names = ", ".join(sorted(str(name)[:30] for name in event)[:8])
    return f"an object with {names}" if names else "an empty object"
