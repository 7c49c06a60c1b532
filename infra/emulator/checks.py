"""Check what a runtime sends to the Runtime API. Each check yields a sentence for each violation.

The rules come from AWS's Runtime API pages, from Amazon's Node.js and Rust runtimes, and from what the Runtime
Interface Emulator was seen to reject or drop.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

SEPARATOR = b"\0" * 8
STREAM_TYPE = "application/vnd.awslambda.http-integration-response"
MAX_BUFFERED = 6 * 1024 * 1024
MAX_PRELUDE = 16 * 1024
ERROR_TYPE = "lambda-runtime-function-error-type"
ERROR_BODY = "lambda-runtime-function-error-body"

_TYPE = re.compile(r"(Runtime|Function)\.[A-Z][a-zA-Z]+")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}


def request_head(version: str, headers: Mapping[str, str]) -> Iterator[str]:
    if version != "HTTP/1.1":
        yield f"the request line says {version!r}, not HTTP/1.1"
    if not headers.get("host"):
        yield "no Host header"
    if not re.fullmatch(r"slm-api-server/\S+ python/3\.\d+", headers.get("user-agent", "")):
        yield f"User-Agent is {headers.get('user-agent')!r}"


def answer_head(headers: Mapping[str, str], invocation_id: str | None) -> Iterator[str]:
    """Check the head of `/response` or `/error`."""
    sent_id = headers.get("lambda-runtime-invocation-id")
    if sent_id != invocation_id:
        yield f"Lambda-Runtime-Invocation-Id is {sent_id!r}, not {invocation_id!r}"
    if "content-type" not in headers:
        yield "no Content-Type"


def stream_head(headers: Mapping[str, str]) -> Iterator[str]:
    """Check the head of a `/response` that has a response mode."""
    if (mode := headers["lambda-runtime-function-response-mode"]) != "streaming":
        yield f"the response mode is {mode!r}; the only one is 'streaming'"
    if headers.get("transfer-encoding") != "chunked" or "content-length" in headers:
        yield "a streamed response must be chunked, without Content-Length"
    if headers.get("content-type") != STREAM_TYPE:
        yield f"the content type is {headers.get('content-type')!r}: the front end would not read the prelude"


def prelude(raw: bytes) -> Iterator[str]:
    """Check the JSON before the separator."""
    if len(raw) > MAX_PRELUDE:
        yield f"the prelude has {len(raw)} bytes; the most is {MAX_PRELUDE}"
    try:
        record = json.loads(raw)
    except ValueError:
        yield f"the prelude is not JSON in UTF-8: {raw[:80]!r}"
        return
    if unknown := record.keys() - {"statusCode", "headers", "cookies"}:
        yield f"the prelude has unknown keys {sorted(unknown)}"
    status = record.get("statusCode")
    if not isinstance(status, int) or not 100 <= status <= 599:
        yield f"statusCode is {status!r}"
    for name, value in record.get("headers", {}).items():
        if not _NAME.fullmatch(name) or name in _HOP_BY_HOP or name == "set-cookie":
            yield f"the prelude's headers hold {name!r}"
        if not isinstance(value, str) or re.search(r"[\r\n\0]", value):
            yield f"the value of {name!r} is {value!r}"
    cookies = record.get("cookies", [])
    if not isinstance(cookies, list) or not all(isinstance(cookie, str) for cookie in cookies):
        yield f"cookies is {cookies!r}"


def trailers(sent: Mapping[str, str], declared: str) -> Iterator[str]:
    """Check the trailers. Lambda silently drops those that are not declared or malformed."""
    declared_names = {name.strip().lower() for name in declared.split(",")}
    for name in sent:
        if name not in declared_names:
            yield f"the trailer {name!r} was not declared"
    if sent:
        if not _TYPE.fullmatch(sent.get(ERROR_TYPE, "")):
            yield f"the error type in the trailer is {sent.get(ERROR_TYPE)!r}"
        try:
            json.loads(base64.b64decode(sent.get(ERROR_BODY, ""), validate=True))
        except ValueError:
            yield "the error body in the trailer is not JSON in base64"


def buffered(body: bytes) -> Iterator[str]:
    """Check a buffered answer."""
    if len(body) > MAX_BUFFERED:
        yield f"a buffered answer has {len(body)} bytes; the most is {MAX_BUFFERED}"
    try:
        record: Any = json.loads(body)
    except ValueError:
        yield "a buffered answer is not JSON"
        return
    if not isinstance(record, dict) or "statusCode" not in record:
        return  # the answer to a direct invoke has no HTTP envelope
    if not isinstance(record["statusCode"], int) or not 100 <= record["statusCode"] <= 599:
        yield f"statusCode is {record['statusCode']!r}"
    content = record.get("body", "")
    if not isinstance(content, str):
        yield "body is not a string"
    elif record.get("isBase64Encoded"):
        try:
            base64.b64decode(content, validate=True)
        except ValueError:
            yield "isBase64Encoded is true, but the body is not base64"
    for name, value in (record.get("headers") or {}).items():
        if not isinstance(value, str) or re.search(r"[\r\n\0]", value):
            yield f"the value of {name!r} is {value!r}"


def failure(headers: Mapping[str, str], body: bytes) -> Iterator[str]:
    """Check a report to `/error`, `/init/error` or `/restore/error`."""
    kind = headers.get(ERROR_TYPE, "")
    if not _TYPE.fullmatch(kind):
        yield f"the error type is {kind!r}"
    try:
        record = json.loads(body)
    except ValueError:
        yield "the error is not JSON"
        return
    if record.keys() != {"errorMessage", "errorType", "stackTrace"}:
        yield f"the error has the keys {sorted(record)}"


def has_no_body(status: int) -> bool:
    return status < 200 or status in (204, 304)
