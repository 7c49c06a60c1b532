"""Direct invokes from Step Functions, the AWS CLI and SDKs: `{"operation": "extract", ...body}`. IAM guards them.

An operation runs its HTTP route, as a user, or as an administrator with DIRECT_ADMIN=true. The answer is the route's
JSON without an envelope. An error becomes a function error (`Function.ModelUnavailable`, ...), so that a state machine
can retry or catch it.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from adapters.aws_lambda.answer import Failure

OPERATIONS = {
    "health": ("GET", "/health"),
    "models": ("GET", "/models"),
    "load": ("POST", "/load"),
    "reload": ("POST", "/reload"),
    "chat": ("POST", "/v1/chat/completions"),
    "extract": ("POST", "/v1/extract"),
    "embeddings": ("POST", "/v1/embeddings"),
    "rerank": ("POST", "/v1/rerank"),
}


class UnknownEvent(ValueError):
    """An event that this function does not serve. The message says what it serves."""


def to_request(event: Any) -> tuple[dict[str, Any], bytes]:
    """Return the ASGI scope and body of an operation. Raises UnknownEvent."""
    if not isinstance(event, dict) or "operation" not in event:
        raise UnknownEvent(f"This function serves HTTP events and {_form()}; got {_shape(event)}.")
    fields = dict(event)
    operation = fields.pop("operation")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise UnknownEvent(f"Unknown operation {str(operation)[:80]!r}. This function serves {_form()}.")
    if fields.get("stream"):
        raise UnknownEvent("A direct invoke returns one JSON document and cannot stream. Remove 'stream'.")
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
    """Return an answer with a status of 400 or above as a function error, typed by its code."""
    try:
        error = json.loads(body)["error"]
        name, message = str(error["code"] or error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        name, message = "error", f"The operation ended with status {status}."
    kind = "".join(part.capitalize() for part in name.split("_") if part.isascii() and part.isalpha())
    return Failure(f"Function.{kind or 'Error'}", message)


def _form() -> str:
    return f'{{"operation": {" | ".join(OPERATIONS)}, ...}}'


def _shape(event: Any) -> str:
    """Describe an event by its keys, without any value that a client sent."""
    if not isinstance(event, dict):
        return f"a JSON {type(event).__name__}"
    records = event.get("Records")
    if isinstance(records, list) and records and isinstance(records[0], dict):
        source = records[0].get("eventSource") or records[0].get("EventSource") or "unknown source"
        return f"records of {str(source)[:40]}"
    names = ", ".join(sorted(str(name)[:30] for name in event)[:8])
    return f"an object with {names}" if names else "an empty object"
