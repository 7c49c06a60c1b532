"""What a runtime may send to the Runtime API, as checks that say what is wrong. Sources: AWS's Runtime API pages, the
Node.js and Rust runtimes, and what the Runtime Interface Emulator was seen to refuse or drop."""

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
    """The head of `/response` and `/error`."""
    given = headers.get("lambda-runtime-invocation-id")
    if given != invocation_id:
        yield f"Lambda-Runtime-Invocation-Id is {given!r}, not {invocation_id!r}"
    if "content-type" not in headers:
        yield "no Content-Type"


def stream_head(headers: Mapping[str, str]) -> Iterator[str]:
    """The head of a `/response` that has a response mode."""
    if (mode := headers["lambda-runtime-function-response-mode"]) != "streaming":
        yield f"the response mode is {mode!r}; only 'streaming' is one"
    if headers.get("transfer-encoding") != "chunked" or "content-length" in headers:
        yield "a streamed response must be chunked, without Content-Length"
    if headers.get("content-type") != STREAM_TYPE:
        yield f"the content type is {headers.get('content-type')!r}: the front end would not read the prelude"


def prelude(raw: bytes) -> Iterator[str]:
    """The JSON before the separator."""
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


def trailers(given: Mapping[str, str], declared: str) -> Iterator[str]:
    """Trailers that are not declared, or not in shape, are dropped silently by Lambda."""
    known = {name.strip().lower() for name in declared.split(",")}
    for name in given:
        if name not in known:
            yield f"the trailer {name!r} was not declared"
    if given:
        if not _TYPE.fullmatch(given.get(ERROR_TYPE, "")):
            yield f"the error type in the trailer is {given.get(ERROR_TYPE)!r}"
        try:
            json.loads(base64.b64decode(given.get(ERROR_BODY, ""), validate=True))
        except ValueError:
            yield "the error body in the trailer is not JSON in base64"


def buffered(body: bytes) -> Iterator[str]:
    """A whole answer to an HTTP event."""
    if len(body) > MAX_BUFFERED:
        yield f"a buffered answer has {len(body)} bytes; the most is {MAX_BUFFERED}"
    try:
        record: Any = json.loads(body)
    except ValueError:
        yield "a buffered answer is not JSON"
        return
    if not isinstance(record, dict) or "statusCode" not in record:
        return  # the plain answer to a direct invoke
    if not isinstance(record["statusCode"], int) or not 100 <= record["statusCode"] <= 599:
        yield f"statusCode is {record['statusCode']!r}"
    content = record.get("body", "")
    if not isinstance(content, str):
        yield "body is not a string"
    elif record.get("isBase64Encoded"):
        try:
            base64.b64decode(content, validate=True)
        except ValueError:
            yield "body is not base64, though isBase64Encoded"
    for name, value in (record.get("headers") or {}).items():
        if not isinstance(value, str) or re.search(r"[\r\n\0]", value):
            yield f"the value of {name!r} is {value!r}"


def failure(headers: Mapping[str, str], body: bytes) -> Iterator[str]:
    """`/error`, `/init/error` and `/restore/error`."""
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
