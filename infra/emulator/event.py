"""Convert an HTTP request to a function URL event (payload format 2.0), and a buffered answer back.

https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Iterable
from typing import Any

CALLER = "arn:aws:iam::000000000000:user/local"  # the caller's identity if IAM_AUTH is on
DOMAIN = "local.lambda-url.eu-central-1.on.aws"

_TEXT = ("text/", "application/json", "application/javascript", "application/xml", "application/x-www-form-urlencoded")


def to_event(
    method: str,
    raw_path: str,
    *,
    query: str = "",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    source_ip: str = "127.0.0.1",
    domain: str = DOMAIN,
    caller: str | None = None,
) -> dict[str, Any]:
    """Return the event. `raw_path` and `query` are percent-encoded. `caller` is the ARN of an IAM identity."""
    joined: dict[str, str] = {}
    cookies: list[str] = []
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == "cookie":
            cookies += [cookie.strip() for cookie in value.split(";")]
        else:
            joined[name] = f"{joined[name]},{value}" if name in joined else value
    # A function receives the URL's own Host, not the caller's.
    joined |= {"host": domain, "x-forwarded-for": source_ip, "x-forwarded-proto": "https", "x-forwarded-port": "443"}
    now = time.time()
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": raw_path,
        "rawQueryString": query,
        "headers": joined,
        "requestContext": {
            "accountId": "anonymous",
            "apiId": domain.partition(".")[0],
            "domainName": domain,
            "domainPrefix": domain.partition(".")[0],
            "http": {
                "method": method,
                "path": raw_path,
                "protocol": "HTTP/1.1",
                "sourceIp": source_ip,
                "userAgent": joined.get("user-agent", ""),
            },
            "requestId": str(uuid.uuid4()),
            "routeKey": "$default",
            "stage": "$default",
            "time": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now)),
            "timeEpoch": int(now * 1000),
        },
        "isBase64Encoded": False,
    }
    if caller is not None:
        event["requestContext"]["authorizer"] = {"iam": {"userArn": caller}}
    if cookies:
        event["cookies"] = cookies
    if body:
        content_type = joined.get("content-type", "")
        text = _decoded(body) if any(content_type.startswith(kind) for kind in _TEXT) else None
        event["body"] = base64.b64encode(body).decode() if text is None else text
        event["isBase64Encoded"] = text is None
    return event


def from_buffered(record: Any, raw: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, headers and body of a buffered answer. As on Lambda, an answer without statusCode is the body."""
    if not isinstance(record, dict) or "statusCode" not in record:
        return 200, [("content-type", "application/json")], raw
    headers = [(name, str(value)) for name, value in (record.get("headers") or {}).items()]
    headers += [("set-cookie", cookie) for cookie in record.get("cookies") or ()]
    content = record.get("body") or ""
    body = base64.b64decode(content) if record.get("isBase64Encoded") else content.encode()
    return int(record["statusCode"]), headers, body


def _decoded(body: bytes) -> str | None:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None
