"""Events: what arrived (function URL, HTTP API, REST API, ALB) as ASGI scope and body, and the buffered answer to it.

Payload 2.0, which function URLs and HTTP APIs send, is read here. Mangum's handler classes read the others, and are
imported when the first one comes: 70 ms that a cold start behind a function URL does not pay. Mangum's gaps (seen in
0.22) are closed here, each beside the reason. Knows no Runtime API.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote

from adapters.aws_lambda.context import LambdaContext
from adapters.aws_lambda.prelude import RawHeaders, has_body, joined

Scope = dict[str, Any]
ResponseMode = Literal["auto", "auto_rest", "response_stream", "buffered"]

_TEXT = ("text/", "application/json", "application/javascript", "application/xml")
_MANGUM: Any = {"api_gateway_base_path": "/", "text_mime_types": list(_TEXT), "exclude_headers": []}


class BadEvent(ValueError):
    """An HTTP event that holds no request that can be answered but by 400."""


class Payload(Protocol):
    """One form of HTTP event: the request in it, and the answer that its sender reads."""

    method: str
    path: str
    query_string: bytes
    body: bytes

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]: ...


class Payload2:
    """Payload format 2.0. Raises KeyError, TypeError, AttributeError or ValueError where it cannot be read."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        request = event["requestContext"]["http"]
        self.method: str = request["method"]
        # Function URLs send the path encoded; HTTP APIs and SAM CLI send it decoded.
        path = request["path"] or "/"
        self.path = unquote(path) if is_function_url(event) else path
        self.query_string = (event.get("rawQueryString") or "").encode()
        body = event.get("body") or ""
        self.body: bytes = base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        named, cookies = joined(headers)
        if body:
            named.setdefault("content-type", "application/json")
        text, encoded = _as_text(named.get("content-type", ""), body)
        answer: dict[str, Any] = {"statusCode": status, "headers": named, "body": text, "isBase64Encoded": encoded}
        return {**answer, "cookies": cookies} if cookies else answer


class MangumPayload:
    """A REST API's, a load balancer's or an HTTP API's 1.0 event, as Mangum reads it. Raises as Payload2 does."""

    def __init__(self, kind: Any, event: dict[str, Any], context: LambdaContext) -> None:
        self._handler = kind(_without_traps(event), context, _MANGUM)
        scope = self._handler.scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        self.body: bytes = self._handler.body

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        # Mangum decodes UTF-8 and fails at latin-1, which is what a header is.
        encoded = [[name, value.decode("latin-1").encode()] for name, value in headers]
        answer: dict[str, Any] = self._handler({"status": status, "headers": encoded, "body": body})
        return answer


class HTTPEvent:
    """One recognised HTTP event."""

    def __init__(self, payload: Payload, event: dict[str, Any], context: LambdaContext) -> None:
        self._payload = payload
        self.method = payload.method
        self.body = payload.body
        self.principal = principal(event)
        self.scope = _scope(payload, event, context)

    @classmethod
    def recognise(cls, event: Any, context: LambdaContext) -> HTTPEvent | None:
        """None if it is not an HTTP event. Raises BadEvent."""
        if not isinstance(event, dict) or not isinstance(event.get("requestContext"), dict):
            return None
        try:
            payload = Payload2(event) if event.get("version") == "2.0" else _by_mangum(event, context)
            return None if payload is None else cls(payload, event, context)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadEvent(repr(error)) from error

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        """The buffered answer, in the shape that this event's sender wants."""
        with_body = has_body(self.method, status)
        answer = self._payload.format(status, headers, body if with_body else b"")
        if not with_body and not any(name == b"content-type" for name, _ in headers):
            answer.get("headers", {}).pop("content-type", None)  # Mangum calls every bodiless answer JSON
        return answer


def _by_mangum(event: dict[str, Any], context: LambdaContext) -> MangumPayload | None:
    from mangum.handlers import ALB, APIGateway, HTTPGateway

    # In Mangum's order: REST events carry "resource", and HTTP API 1.0 ones do, too.
    for kind in (ALB, HTTPGateway, APIGateway):
        if kind.infer(event, context, _MANGUM):
            return MangumPayload(kind, event, context)
    return None


def _as_text(content_type: str, body: bytes) -> tuple[str, bool]:
    """The body for a JSON envelope, and whether it had to become base64."""
    if any(kind in content_type for kind in _TEXT) or not body:
        try:
            return body.decode(), False
        except UnicodeDecodeError:
            pass
    return base64.b64encode(body).decode(), True


def _scope(payload: Payload, event: dict[str, Any], context: LambdaContext) -> Scope:
    headers = _headers(event)
    values = {name.decode(): value.decode("latin-1") for name, value in headers}
    client = _client(event, values)
    return {
        "type": "http",
        # 2.0 sends Starlette down its task-group path, which cancels a stream at the first http.disconnect.
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": payload.method,
        "scheme": values.get("x-forwarded-proto", "https").partition(",")[0].strip(),
        "path": payload.path,
        "raw_path": (event.get("rawPath") or "").encode() or quote(payload.path).encode(),
        "root_path": "",
        "query_string": payload.query_string,
        "headers": headers,
        "server": _server(values),
        "client": (client, 0) if client else None,
        "aws.event": event,
        "aws.context": context,
    }


def principal(event: Mapping[str, Any]) -> str | None:
    """The ARN of the IAM identity that signed the request; None unless IAM guards the URL. AWS writes it: what a client
    sends is in `headers` and `body`."""
    authorizer = event["requestContext"].get("authorizer")
    iam = authorizer.get("iam") if isinstance(authorizer, dict) else None
    arn = iam.get("userArn") if isinstance(iam, dict) else None
    return arn if isinstance(arn, str) and arn else None


def is_function_url(event: Mapping[str, Any]) -> bool:
    """By its domain, `<id>.lambda-url.<region>.on.aws`; a CloudFront in front does not change it."""
    domain = event.get("requestContext", {}).get("domainName")
    return event.get("version") == "2.0" and isinstance(domain, str) and ".lambda-url." in domain


def streamed(event: Mapping[str, Any], mode: ResponseMode, environ: Mapping[str, str]) -> bool:
    """Whether to stream the answer to an HTTP event.

    Lambda does not say how it was invoked, so this is configuration: `auto` streams to function URLs, but not under
    SAM CLI, whose parser wants one JSON document. `auto_rest` streams to REST APIs as well, for integrations with
    responseTransferMode STREAM, whose events look like any other REST API's.
    """
    if mode in ("auto", "auto_rest"):
        to = is_function_url(event) or (mode == "auto_rest" and _is_rest_api(event))
        return to and environ.get("AWS_SAM_LOCAL") != "true"
    return mode == "response_stream"


def _is_rest_api(event: Mapping[str, Any]) -> bool:
    """By the resource that it names; an HTTP API's event of version 1.0 has a version, too."""
    return "resource" in event and "version" not in event


# An HTTP API gives up after 30 s and tells nobody; a second is for the way there and back.
HTTP_API_S = 29.0
_CANNED_S = 60.0  # an event whose time is older than that was kept and sent by hand


def answer_by(event: Mapping[str, Any], deadline: float, environ: Mapping[str, str]) -> float:
    """When the sender of an HTTP event stops waiting, if that is before `deadline` (both monotonic).

    Without it an extraction that its client has been told 503 about would go on, and be paid for, to its end.
    """
    is_http_api = event.get("version") in ("1.0", "2.0") and not is_function_url(event)
    if not is_http_api or environ.get("AWS_SAM_LOCAL") == "true":
        return deadline
    context = event["requestContext"]
    epoch_ms = context.get("timeEpoch", context.get("requestTimeEpoch"))
    waited = time.time() - epoch_ms / 1000 if isinstance(epoch_ms, int | float) else 0.0
    if not 0 <= waited <= _CANNED_S:
        waited = 0.0
    return min(deadline, time.monotonic() + HTTP_API_S - waited)


def _without_traps(event: dict[str, Any]) -> dict[str, Any]:
    """A copy that Mangum reads without failing: no null where it wants a dict, no Host that it cannot split."""
    copy = dict(event)
    copy["headers"] = {}  # the scope's are ours; the key alone tells an ALB event of single values from one of many
    if copy.get("multiValueHeaders") is not None:
        copy["multiValueHeaders"] = {}
    else:
        copy.pop("multiValueHeaders", None)
    context = dict(copy["requestContext"])
    if isinstance(context.get("http"), dict):
        context["http"] = {"sourceIp": None, **context["http"]}
    if "identity" in context:
        context["identity"] = context["identity"] or {}
    copy["requestContext"] = context
    copy["cookies"] = None
    copy["rawQueryString"] = copy.get("rawQueryString") or ""
    return copy


def _headers(event: Mapping[str, Any]) -> RawHeaders:
    """All headers, lower-case, latin-1 where they can be; cookies as one header."""
    pairs: list[tuple[str, str]] = []
    many = event.get("multiValueHeaders") or {}
    for name, values in many.items():
        pairs += [(name.lower(), str(value)) for value in values or ()]
    seen = {name for name, _ in pairs}
    pairs += [
        (name.lower(), str(value))
        for name, value in (event.get("headers") or {}).items()
        if name.lower() not in seen and value is not None
    ]
    cookies = [value for name, value in pairs if name == "cookie"]
    if event.get("cookies"):
        cookies = [str(cookie) for cookie in event["cookies"]]
    if cookies:
        pairs = [pair for pair in pairs if pair[0] != "cookie"]
        pairs.append(("cookie", "; ".join(cookies)))
    return [(_bytes(name), _bytes(value)) for name, value in pairs]


def _bytes(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def _server(headers: Mapping[str, str]) -> tuple[str, int | None]:
    host = headers.get("host", "localhost")
    name, _, port = host.rpartition(":")
    if not name or not port.isdecimal():  # no port, or the end of an IPv6 address
        name, port = host, headers.get("x-forwarded-port", "443").partition(",")[0].strip()
    return name.strip("[]"), int(port) if port.isdecimal() else None


def _client(event: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    context = event["requestContext"]
    found = (context.get("http") or {}).get("sourceIp") or (context.get("identity") or {}).get("sourceIp")
    if found is None and "elb" in context:  # the load balancer appends the peer it saw
        found = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return str(found) if found else None
