"""Read HTTP events (function URL, HTTP API, REST API, load balancer) as ASGI scopes, and format buffered answers.

Payload 2.0 is parsed here: function URLs and HTTP APIs send it. Mangum parses REST API, load balancer and HTTP API 1.0
events. It is imported when the first of them arrives, because its import takes 70 ms of a cold start. The comments name
what Mangum 0.22 leaves open and this module adds.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote

from adapters.aws_lambda.answer import RawHeaders, has_body, joined

Scope = dict[str, Any]
ResponseMode = Literal["auto", "auto_rest", "response_stream", "buffered"]

_TEXT = ("text/", "application/json", "application/javascript", "application/xml")
_MANGUM: Any = {"api_gateway_base_path": "/", "text_mime_types": list(_TEXT), "exclude_headers": []}


class BadEvent(ValueError):
    """An HTTP event without a readable request. The answer is a 400."""


class Payload(Protocol):
    """The request in one kind of HTTP event, and the format of its answer."""

    method: str
    path: str
    query_string: bytes
    body: bytes

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]: ...


class Payload2:
    """Payload format 2.0. Raises KeyError, TypeError, AttributeError or ValueError for a malformed event."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        request = event["requestContext"]["http"]
        self.method: str = request["method"]
        # Function URLs send the path percent-encoded, HTTP APIs and SAM CLI send it decoded.
        path = request["path"] or "/"
        self.path = unquote(path) if is_function_url(event) else path
        self.query_string = (event.get("rawQueryString") or "").encode()
        body = event.get("body") or ""
        self.body: bytes = base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        values, cookies = joined(headers)
        if body:
            values.setdefault("content-type", "application/json")
        text, encoded = _as_text(values.get("content-type", ""), body)
        answer: dict[str, Any] = {"statusCode": status, "headers": values, "body": text, "isBase64Encoded": encoded}
        return {**answer, "cookies": cookies} if cookies else answer


class MangumPayload:
    """A REST API, load balancer or HTTP API 1.0 event, parsed by Mangum. Raises the same errors as Payload2."""

    def __init__(self, kind: Any, event: dict[str, Any]) -> None:
        self._handler = kind(_without_traps(event), None, _MANGUM)
        scope = self._handler.scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        self.body: bytes = self._handler.body

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        # Headers are latin-1. Mangum decodes them as UTF-8 and would fail.
        encoded = [[name, value.decode("latin-1").encode()] for name, value in headers]
        answer: dict[str, Any] = self._handler({"status": status, "headers": encoded, "body": body})
        return answer


class HTTPEvent:
    """One HTTP event: its ASGI scope and body, and the IAM principal that signed it."""

    def __init__(self, payload: Payload, event: dict[str, Any]) -> None:
        self._payload = payload
        self.method = payload.method
        self.body = payload.body
        self.principal = principal(event)
        self.scope = _scope(payload, event)

    @classmethod
    def read(cls, event: Any) -> HTTPEvent | None:
        """Return None for anything but an HTTP event. Raises BadEvent."""
        if not isinstance(event, dict) or not isinstance(event.get("requestContext"), dict):
            return None
        try:
            payload = Payload2(event) if event.get("version") == "2.0" else _by_mangum(event)
            return None if payload is None else cls(payload, event)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadEvent(repr(error)) from error

    def format(self, status: int, headers: RawHeaders, body: bytes) -> dict[str, Any]:
        """Return the buffered answer in the format of this event's sender."""
        with_body = has_body(self.method, status)
        answer = self._payload.format(status, headers, body if with_body else b"")
        if not with_body and not any(name == b"content-type" for name, _ in headers):
            answer.get("headers", {}).pop("content-type", None)  # Mangum declares JSON even without a body
        return answer


def _by_mangum(event: dict[str, Any]) -> MangumPayload | None:
    from mangum.handlers import ALB, APIGateway, HTTPGateway

    # In Mangum's order: REST API events have a "resource", and so have HTTP API 1.0 events.
    for kind in (ALB, HTTPGateway, APIGateway):
        if kind.infer(event, None, _MANGUM):
            return MangumPayload(kind, event)
    return None


def _as_text(content_type: str, body: bytes) -> tuple[str, bool]:
    """Return the body as a JSON string, and whether it is base64."""
    if any(kind in content_type for kind in _TEXT) or not body:
        try:
            return body.decode(), False
        except UnicodeDecodeError:
            pass
    return base64.b64encode(body).decode(), True


def _scope(payload: Payload, event: dict[str, Any]) -> Scope:
    headers = _headers(event)
    values = {name.decode(): value.decode("latin-1") for name, value in headers}
    client = _client(event, values)
    return {
        "type": "http",
        # With 2.0 Starlette streams in a task group and cancels it at the first http.disconnect.
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
    }


def principal(event: Mapping[str, Any]) -> str | None:
    """Return the ARN of the IAM identity that signed the request, or None for a URL without AWS_IAM.

    AWS writes it after it has verified the signature. A client can only set `headers` and `body`.
    """
    authorizer = event["requestContext"].get("authorizer")
    iam = authorizer.get("iam") if isinstance(authorizer, dict) else None
    arn = iam.get("userArn") if isinstance(iam, dict) else None
    return arn if isinstance(arn, str) and arn else None


def is_function_url(event: Mapping[str, Any]) -> bool:
    """Return whether the domain is `<id>.lambda-url.<region>.on.aws`. CloudFront does not change it."""
    domain = event.get("requestContext", {}).get("domainName")
    return event.get("version") == "2.0" and isinstance(domain, str) and ".lambda-url." in domain


def streamed(event: Mapping[str, Any], mode: ResponseMode, environ: Mapping[str, str]) -> bool:
    """Return whether to stream the answer to an HTTP event.

    The event does not say whether its sender streams, so RESPONSE_MODE does. `auto` streams to function URLs, except
    under SAM CLI, which expects one JSON document. `auto_rest` also streams to REST APIs, for integrations with
    responseTransferMode STREAM, whose events look like those of any other REST API.
    """
    if mode in ("auto", "auto_rest"):
        streams = is_function_url(event) or (mode == "auto_rest" and _is_rest_api(event))
        return streams and environ.get("AWS_SAM_LOCAL") != "true"
    return mode == "response_stream"


def _is_rest_api(event: Mapping[str, Any]) -> bool:
    """Return whether the event has a resource and no version. HTTP API 1.0 events have both."""
    return "resource" in event and "version" not in event


# An HTTP API gives up after 30 s without notice. One second is for the way there and back.
HTTP_API_S = 29.0
_STALE_S = 60.0  # an event with an older time stamp was recorded and sent again by hand


def answer_by(event: Mapping[str, Any], deadline: float, environ: Mapping[str, str]) -> float:
    """Return when the sender of an HTTP event stops waiting, at the latest `deadline` (both monotonic).

    Without it an extraction would continue, and cost money, after the HTTP API has sent its client a 503.
    """
    is_http_api = event.get("version") in ("1.0", "2.0") and not is_function_url(event)
    if not is_http_api or environ.get("AWS_SAM_LOCAL") == "true":
        return deadline
    context = event["requestContext"]
    epoch_ms = context.get("timeEpoch", context.get("requestTimeEpoch"))
    waited = time.time() - epoch_ms / 1000 if isinstance(epoch_ms, int | float) else 0.0
    if not 0 <= waited <= _STALE_S:
        waited = 0.0
    return min(deadline, time.monotonic() + HTTP_API_S - waited)


def _without_traps(event: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that Mangum can parse: no null in place of a dict, no Host header that it cannot split."""
    copy = dict(event)
    copy["headers"] = {}  # read by _headers; the keys tell the two kinds of ALB events apart
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
    """Return all headers in lower case, as latin-1 where possible, and the cookies as one header."""
    pairs: list[tuple[str, str]] = []
    many = event.get("multiValueHeaders") or {}
    for name, values in many.items():
        pairs += [(name.lower(), str(value)) for value in values or ()]
    multiple = {name for name, _ in pairs}
    pairs += [
        (name.lower(), str(value))
        for name, value in (event.get("headers") or {}).items()
        if name.lower() not in multiple and value is not None
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
    address = (context.get("http") or {}).get("sourceIp") or (context.get("identity") or {}).get("sourceIp")
    if address is None and "elb" in context:  # a load balancer appends its peer's address
        address = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return str(address) if address else None
