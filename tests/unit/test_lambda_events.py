"""Lambda events become ASGI scopes, and answers get the format of the event's sender."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.aws_lambda.events import BadEvent, HTTPEvent, answer_by, streamed
from infra.emulator.event import from_buffered, to_event

FILES = Path(__file__).parents[1] / "events"


def load(name: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((FILES / f"{name}.json").read_text())
    return event


def read(event: dict[str, Any]) -> HTTPEvent:
    http_event = HTTPEvent.read(event)
    assert http_event is not None
    return http_event


def headers(event: HTTPEvent) -> dict[bytes, bytes]:
    return dict(event.scope["headers"])


def url(**changes: Any) -> dict[str, Any]:
    return {**load("function_url"), **changes}


EXPECTED = {
    "function_url": ("POST", "/v1/chat rooms/a/b", b"wait=1&tag=a&tag=b%20c", "https", 443, "203.0.113.7"),
    "function_url_iam": ("GET", "/health", b"", "https", 443, "2001:db8::1"),
    "http_api_v2": ("PUT", "/v1/a b", b"wait=1", "https", 443, "203.0.113.7"),
    "http_api_v1": ("GET", "/v1/models", b"tag=a&tag=b", "https", 443, "203.0.113.7"),
    "rest_api": ("POST", "/v1/chat/completions", b"", "https", 443, "203.0.113.7"),
    "alb": ("GET", "/a b", b"q=caf%C3%A9", "http", 80, "203.0.113.7"),
    "alb_multi_value": ("POST", "/v1/extract", b"tag=a&tag=b", "https", 443, "203.0.113.7"),
    "sam_start_api": ("POST", "/v1/a b", b"", "http", 3000, "127.0.0.1"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_senders_event_becomes_a_scope(name: str) -> None:
    """Method, path, query, scheme, port and peer are in different places of each sender's event."""
    event = load(name)
    scope = read(event).scope

    method, path, query, scheme, port, peer = EXPECTED[name]
    assert (scope["type"], scope["method"], scope["path"], scope["query_string"]) == ("http", method, path, query)
    assert (scope["scheme"], scope["server"][1], scope["client"][0]) == (scheme, port, peer)
    assert scope["asgi"]["spec_version"] == "2.4"
    assert all(name == name.lower() for name, _ in scope["headers"])


@pytest.mark.parametrize("name", EXPECTED)
def test_bodies_are_bytes(name: str) -> None:
    """The event holds text, base64 or no body."""
    expected = {"http_api_v2": b"\0\1\2\xff", "function_url_iam": b"", "http_api_v1": b"", "alb": b""}

    assert read(load(name)).body == expected.get(
        name, '{"messages":[{"role":"user","content":"Hello, Zürich"}],"stream":true}'.encode()
    )


def test_sqs_is_not_http() -> None:
    """An event with Records is not an HTTP request."""
    assert HTTPEvent.read(load("sqs")) is None


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/plain", "/plain"),
        ("/a%20b", "/a b"),
        ("/a%2520b", "/a%20b"),
        ("/a%2Fb", "/a/b"),
        ("/a+b", "/a+b"),
        ("//a//b", "//a//b"),
        ("/%E6%9D%B1", "/東"),
        ("/%ff", "/\ufffd"),
        ("/%", "/%"),
        ("", "/"),
    ],
)
def test_paths_of_function_urls_are_decoded_once(raw: str, path: str) -> None:
    """A function URL sends the path encoded, and raw_path is that path."""
    scope = read(to_event("GET", raw)).scope

    assert scope["path"] == path
    assert scope["raw_path"] == (raw.encode() or b"/")


def test_paths_of_http_apis_are_not_decoded_again() -> None:
    """An HTTP API sends the path decoded, so a remaining percent sign is literal."""
    event = load("http_api_v2")
    event["rawPath"] = event["requestContext"]["http"]["path"] = "/a%20b"

    assert read(event).scope["path"] == "/a%20b"


def test_cookies_become_one_header() -> None:
    """The cookies list takes precedence over a header. Several cookie headers are joined with semicolons."""
    assert headers(read(load("function_url")))[b"cookie"] == b"session=1; theme=dark"
    assert headers(read(load("rest_api")))[b"cookie"] == b"a=1; b=2"
    assert headers(read(url(cookies=None, headers={"Cookie": "x=1"})))[b"cookie"] == b"x=1"


def test_repeated_headers_stay_separate() -> None:
    """multiValueHeaders become separate headers without duplicates."""
    accept = [value for name, value in read(load("alb_multi_value")).scope["headers"] if name == b"accept"]

    assert accept == [b"application/json", b"text/plain"]


def test_header_values_are_latin_1_if_possible() -> None:
    """ASGI headers are latin-1 bytes. Other characters are sent as UTF-8."""
    values = headers(read(url(headers={"X-Latin": "café", "X-Wide": "東", "X-Number": 5, "X-None": None})))

    assert values[b"x-latin"] == b"caf\xe9"
    assert values[b"x-wide"] == "東".encode()
    assert values[b"x-number"] == b"5"
    assert b"x-none" not in values


@pytest.mark.parametrize(
    ("sent_headers", "server"),
    [
        ({"host": "a.example"}, ("a.example", 443)),
        ({"host": "a.example:8080"}, ("a.example", 8080)),
        ({"host": "[::1]:8080"}, ("::1", 8080)),
        ({"host": "[::1]"}, ("::1", 443)),
        ({"host": "a:x"}, ("a:x", 443)),
        ({"host": "a", "x-forwarded-port": "443,80"}, ("a", 443)),
        ({"host": "a", "x-forwarded-port": "x"}, ("a", None)),
        ({}, ("localhost", 443)),
        (None, ("localhost", 443)),
    ],
)
def test_any_host_header_is_accepted(sent_headers: Any, server: tuple[str, int | None]) -> None:
    """No Host header makes an event unreadable."""
    assert read(url(headers=sent_headers)).scope["server"] == server


def test_only_method_and_path_are_required() -> None:
    """Headers, source address, query and body may be missing."""
    event = {"version": "2.0", "requestContext": {"http": {"method": "GET", "path": "/"}, "domainName": "x"}}

    scope = read(event).scope

    assert (scope["path"], scope["query_string"], scope["client"], scope["headers"]) == ("/", b"", None, [])


@pytest.mark.parametrize("query", ["", "a=1&a=2", "k%C3%A9y=v", "kéy=v", "=&&", None])
def test_query_strings_are_not_changed(query: str | None) -> None:
    """The application parses the raw query string."""
    assert read(url(rawQueryString=query)).scope["query_string"] == (query or "").encode()


@pytest.mark.parametrize(
    "event",
    [
        {"version": "2.0", "requestContext": {"http": {}}},
        url(isBase64Encoded=True, body="abc"),
        url(body=5),
        {**load("rest_api"), "httpMethod": None, "path": 5},
    ],
    ids=["no method", "base64", "body", "path"],
)
def test_unreadable_events_are_bad_events(event: dict[str, Any]) -> None:
    """Every error that Mangum raises becomes a BadEvent."""
    with pytest.raises(BadEvent):
        read(event)


@pytest.mark.parametrize(
    ("name", "mode", "sam", "expected"),
    [
        ("function_url", "auto", None, True),
        ("function_url_iam", "auto", None, True),
        ("function_url", "auto", "true", False),
        ("function_url", "buffered", None, False),
        ("function_url", "response_stream", "true", True),
        ("http_api_v2", "auto", None, False),
        ("http_api_v1", "auto", None, False),
        ("rest_api", "auto", None, False),
        ("rest_api", "response_stream", None, True),
        ("rest_api", "auto_rest", None, True),
        ("rest_api", "auto_rest", "true", False),
        ("function_url", "auto_rest", None, True),
        ("http_api_v1", "auto_rest", None, False),
        ("http_api_v2", "auto_rest", None, False),
        ("alb", "auto_rest", None, False),
        ("alb", "auto", None, False),
        ("sam_start_api", "auto", "true", False),
        ("sam_start_api", "auto", None, False),
    ],
)
def test_which_events_are_streamed(name: str, mode: Any, sam: str | None, expected: bool) -> None:
    """By default only function URLs are streamed, unless SAM CLI sent the event. RESPONSE_MODE overrides this."""
    environ = {"AWS_SAM_LOCAL": sam} if sam else {}

    assert streamed(load(name), mode, environ) is expected


@pytest.mark.parametrize(
    ("name", "age_s", "left_s"),
    [
        ("http_api_v2", 0, 29),
        ("http_api_v2", 12, 17),
        ("http_api_v2", 86400, 29),  # an event that was delayed by a day
        ("http_api_v2", -5, 29),  # clocks differ
        ("http_api_v2", None, 29),
        ("http_api_v1", 3, 26),
        ("function_url", 12, 300),
        ("rest_api", 12, 300),
        ("alb", None, 300),
    ],
)
def test_an_http_api_has_a_deadline_of_thirty_seconds(name: str, age_s: float | None, left_s: float) -> None:
    """They count from the gateway's receipt of the request. Other senders wait as long as the function may run."""
    event, now = load(name), time.monotonic()
    key = "requestTimeEpoch" if name == "http_api_v1" else "timeEpoch"
    event["requestContext"].pop(key, None)
    if age_s is not None:
        event["requestContext"][key] = (time.time() - age_s) * 1000

    assert answer_by(event, now + 300, {}) - now == pytest.approx(left_s, abs=0.5)
    assert answer_by(event, now + 5, {}) == now + 5
    assert answer_by(event, now + 300, {"AWS_SAM_LOCAL": "true"}) == now + 300


JSON = [(b"content-type", b"application/json")]


@pytest.mark.parametrize("name", EXPECTED)
def test_buffered_answers(name: str) -> None:
    """Each sender's answer has status, body and headers."""
    answer = read(load(name)).format(201, [*JSON, (b"x-a", b"caf\xe9")], '{"a":"é"}'.encode())

    assert (answer["statusCode"], answer["body"], answer["isBase64Encoded"]) == (201, '{"a":"é"}', False)
    key = "multiValueHeaders" if name == "alb_multi_value" else "headers"
    assert answer[key]["x-a"] in ("café", ["café"])


@pytest.mark.parametrize("name", ["function_url", "rest_api", "alb"])
def test_binary_answers_are_base64(name: str) -> None:
    """Bytes that are not text are encoded, and isBase64Encoded is true."""
    answer = read(load(name)).format(200, [(b"content-type", b"image/png")], b"\x89PNG\0")

    assert answer["isBase64Encoded"] is True
    assert from_buffered(answer, b"")[2] == b"\x89PNG\0"


@pytest.mark.parametrize("name", ["function_url", "rest_api", "alb"])
@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body_have_no_type(name: str, status: int) -> None:
    """Mangum would add a JSON content type."""
    answer = read(load(name)).format(status, [], b"ignored")

    assert answer["body"] == ""
    assert "content-type" not in answer["headers"]


@pytest.mark.parametrize(
    ("authorizer", "expected"),
    [
        ({"iam": {"userArn": "arn:aws:iam::1:user/ann"}}, "arn:aws:iam::1:user/ann"),
        ({"iam": {"userArn": ""}}, None),
        ({"iam": {"userArn": 5}}, None),
        ({"iam": None}, None),
        ({"jwt": {"claims": {"userArn": "arn:aws:iam::1:user/ann"}}}, None),
        ("arn:aws:iam::1:user/ann", None),
        (None, None),
    ],
)
def test_the_principal_comes_from_the_iam_authorizer(authorizer: Any, expected: str | None) -> None:
    """AWS adds it to the event after checking the signature. Headers and other authorizers do not count."""
    event = to_event("GET", "/health", headers=[("authorizer", "arn:aws:iam::1:user/eve")])
    event["requestContext"]["authorizer"] = authorizer

    assert read(event).principal == expected
