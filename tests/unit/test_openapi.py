"""The OpenAPI document and the page made from it: complete, valid, and true of what the server answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import jsonschema_rs
import pytest
from openapi_spec_validator import validate

from handlers.dispatch import dispatch
from handlers.docs import page
from handlers.http import Request, Response
from handlers.openapi import document, encoded
from handlers.operations import OPERATIONS
from handlers.routes import ROUTES
from tests.fakes import ScriptedEmbedder, ScriptedEngine, fake_service

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
    "POST /v1/completions": {"prompt": "Hi", "echo": True},
    "POST /infill": {"input_prefix": "a", "input_suffix": "b"},
    "POST /v1/chat/completions/input_tokens": {"messages": MESSAGES},
    "POST /v1/responses": {"input": "Hi", "include": ["message.output_text.logprobs"]},
    "POST /v1/responses/input_tokens": {"input": "Hi"},
    "POST /tokenize": {"content": "Hi", "with_pieces": True},
    "POST /detokenize": {"tokens": [72, 105]},
    "POST /v1/extract": {"text": "a is 1"},
    "POST /v1/embeddings": {"input": ["a", "b"]},
    "POST /load": {"repo_id": "org/repo", "filename": "a.gguf"},
    "POST /reload": {},
}


def ask(method: str, path: str, body: Any = None) -> tuple[Response, bytes]:
    """Answer a request from this machine, which may do everything."""

    async def go() -> tuple[Response, bytes]:
        service = fake_service(ScriptedEngine('{"a": 1}'), embedder=ScriptedEmbedder()).service
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "host": "localhost"}
        request = Request(method, path, "req_1", headers, body=content, client="127.0.0.1")
        response = await dispatch(service, request)
        try:
            if isinstance(response.body, bytes):
                return response, response.body
            return response, b"".join([chunk async for chunk in response.body])
        finally:
            await response.aclose()

    return asyncio.run(go())


def schema_of(method: str, path: str, media_type: str) -> Any:
    answers: Any = document()["paths"][path][method.lower()]["responses"]["200"]["content"]
    return answers[media_type]["schema"]


def check(schema: Any, value: Any) -> None:
    """Raise a ValidationError unless `value` fits `schema`, whose references are the document's."""
    jsonschema_rs.validate({**schema, "components": document()["components"]}, value)


def test_every_route_has_an_entry_and_every_entry_a_route() -> None:
    """A route that the document does not describe is not finished."""
    assert set(OPERATIONS) == {f"{route.method} {route.path}" for route in ROUTES}


def test_the_document_is_valid_openapi() -> None:
    """Checked against the specification's own schema, references and ids included."""
    validate(document())
    assert json.loads(encoded()) == json.loads(json.dumps(document()))


@pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if route.method == "GET" and "{" not in route.path],
    ids=lambda route: route.path,
)
def test_answers_to_get_fit_their_schemas(route: Any) -> None:
    """What the server sends has the documented content type and, if it is JSON, fits the schema."""
    operation = OPERATIONS[f"GET {route.path}"]
    path = route.path + ("fake-1b" if route.path.endswith("/") else "")
    response, body = ask("GET", path)

    assert response.status == 200
    assert dict(response.headers)["content-type"].partition(";")[0] == operation.media_type
    if operation.media_type == "application/json":
        check(schema_of("GET", operation.path or route.path, "application/json"), json.loads(body))


@pytest.mark.parametrize("name", BODIES)
def test_answers_to_post_fit_their_schemas(name: str) -> None:
    """All fields that are always sent are required, so an answer without one would fail here."""
    method, path = name.split()
    response, body = ask(method, path, BODIES[name])

    assert response.status == 200, body
    check(schema_of(method, path, "application/json"), json.loads(body))


@pytest.mark.parametrize("name", [name for name in BODIES if OPERATIONS[name].events])
def test_events_of_streams_fit_their_schemas(name: str) -> None:
    """Each event fits one of the types that the stream's entry names, and a stream ends as it says."""
    method, path = name.split()
    response, body = ask(method, path, BODIES[name] | {"stream": True})
    frames = body.decode().removesuffix("\n\n").split("\n\n")
    events = [dict(line.split(": ", 1) for line in frame.splitlines() if line[0] != ":") for frame in frames]
    schema = schema_of(method, path, "text/event-stream")
    data = schema["properties"]["data"]

    assert response.status == 200
    assert len(events) > 1
    for event in events:
        check(schema, event)
    if OPERATIONS[name].done:
        assert events.pop() == {"data": OPERATIONS[name].done}
        data = data["anyOf"][0]
    for event in events:
        check(data["contentSchema"], json.loads(event["data"]))


def test_a_wrong_answer_does_not_fit() -> None:
    """The schemas of answers are strict about what is always there."""
    _, body = ask("POST", "/v1/chat/completions", BODIES["POST /v1/chat/completions"])
    completion = json.loads(body)
    schema = schema_of("POST", "/v1/chat/completions", "application/json")
    for name in ("object", "usage", "choices"):
        with pytest.raises(jsonschema_rs.ValidationError):
            check(schema, {key: value for key, value in completion.items() if key != name})


def test_errors_fit_their_schema() -> None:
    """The envelope is that of every documented error."""
    response, body = ask("POST", "/v1/chat/completions", {"messages": []})
    responses: Any = document()["components"]["responses"]
    described = document()["paths"]["/v1/chat/completions"]["post"]["responses"][str(response.status)]
    content = responses[described["$ref"].rpartition("/")[2]]["content"]

    assert response.status == 400
    check(content["application/json"]["schema"], json.loads(body))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("verbosity", "medium", True),
        ("verbosity", None, True),
        ("verbosity", "high", False),
        ("use_beam_search", False, True),
        ("use_beam_search", 0, False),
        ("repetition_penalty", 1.0, True),
        ("temperature", 2, True),
        ("temperature", 2.1, False),
        ("user", "anyone", True),
    ],
)
def test_the_schema_of_a_request_agrees_with_the_decoder(field: str, value: Any, accepted: bool) -> None:
    """Bounds, and fields that are not supported: what the schema refuses is a 400."""
    body = {"messages": MESSAGES, field: value}
    response, _ = ask("POST", "/v1/chat/completions", body)
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document()["components"]}

    assert response.status == (200 if accepted else 400)
    assert jsonschema_rs.is_valid(schema, body) == accepted


def test_a_field_that_may_be_null_has_its_description() -> None:
    """msgspec writes it to the type; readers of the document look for it at the field."""
    fields = document()["components"]["schemas"]["ChatRequest"]["properties"]

    assert fields["max_tokens"]["description"] == "The most tokens to generate."
    assert all("description" not in option for option in fields["max_tokens"]["anyOf"])
    assert "The most tokens to generate." in page().decode()


def test_examples_fit_their_schemas() -> None:
    """The example of every request is one that the server accepts."""
    for name, operation in OPERATIONS.items():
        if operation.example is not None:
            method, path = name.split()
            content: Any = document()["paths"][path][method.lower()]["requestBody"]["content"]
            check(content["application/json"]["schema"], operation.example)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_its_policy_forbids_it() -> None:
    """Every link stays on the page or on this server, there is no script, and the style's hash is the policy's."""
    response, body = ask("GET", "/docs")
    text = body.decode()
    tags = Page(text).tags
    policy = dict(response.headers)["content-security-policy"]
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)

    ids = {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    assert {attributes["href"] for tag, attributes in tags if "href" in attributes} - ids == {"openapi.json"}
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not [name for _, attributes in tags for name in attributes if name == "style" or name.startswith("on")]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()}'" in policy
    assert len(style) == 1
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_page_shows_every_route_and_field() -> None:
    """With a command line for each."""
    text = page().decode()
    for path, item in document()["paths"].items():
        for method in item:
            assert f"{method.upper()} {path}</code>" in text
            assert f"curl &quot;$URL{path}&quot;" in text
    for schema in document()["components"]["schemas"].values():
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in text


def test_both_are_open_where_keys_are_needed() -> None:
    """They hold nothing secret."""
    from core.settings import keys

    async def go(path: str) -> int:
        service = fake_service(api_keys=keys("secret")).service
        return (await dispatch(service, Request("GET", path, "req_1", client="192.0.2.1"))).status

    assert [asyncio.run(go(path)) for path in ("/openapi.json", "/docs", "/v1/models")] == [200, 200, 401]
