import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import CARD, FakeService, ScriptedEngine, fake_service

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def post(fake: FakeService, **fields: Any) -> tuple[int, Any]:
    async def call() -> tuple[int, Any]:
        body = json.dumps({"text": "Ann is 31.", **fields}).encode()
        headers = {"content-type": "application/json"}
        response = await dispatch(fake.service, Request("POST", "/v1/extract", "req_1", headers, body=body))
        try:
            if isinstance(response.body, bytes):
                return response.status, json.loads(response.body)
            return response.status, b"".join([chunk async for chunk in response.body]).decode()
        finally:
            await response.aclose()

    status, body = asyncio.run(call())
    assert fake.host.leases == 0
    assert fake.engine.running == 0
    return status, body


def service_answering(*pieces: str) -> FakeService:
    return fake_service(ScriptedEngine(pieces=pieces, card=replace(CARD, n_ctx=2048)))


def prompt(fake: FakeService) -> str:
    return bytes(fake.engine.requests[-1].prompt).decode()


def test_an_extraction_is_parsed_and_validated() -> None:
    """The answer holds the raw text, the data, usage and whether the data is valid."""
    fake = service_answering('{"name": "Ann"', ', "age": 31}')

    status, body = post(fake, schema=PERSON)

    assert status == 200
    assert body.pop("id").startswith("extr-")
    assert body.pop("created") > 0
    assert body.pop("usage")["completion_tokens"] == 2
    assert body == {
        "object": "extraction",
        "model": "fake-1b",
        "data": {"name": "Ann", "age": 31},
        "raw": '{"name": "Ann", "age": 31}',
        "valid": True,
        "finish_reason": "stop",
        "errors": [],
    }


def test_extraction_has_its_own_defaults() -> None:
    """The schema becomes the grammar; temperature is 0 and max_tokens is 1024 unless the client sets them."""
    fake = service_answering("{}")

    post(fake, schema=PERSON)
    post(fake, max_tokens=7, temperature=0.5)

    first, second = fake.engine.requests
    assert first.grammar != second.grammar
    assert '"name"' in (first.grammar or "")
    assert (first.sampling.temperature, first.max_tokens) == (0.0, 1024)
    assert (second.sampling.temperature, second.max_tokens) == (0.5, 7)


def test_invalid_data_is_reported_with_its_path() -> None:
    """The validator reports the path and the keyword."""
    fake = service_answering('{"name": 5, "age": 31}')

    _, body = post(fake, schema=PERSON)

    assert body["valid"] is False
    assert body["data"] == {"name": 5, "age": 31}
    assert body["errors"] == [{"code": "schema", "message": "'/name' does not satisfy 'type'.", "path": "/name"}]


def test_a_cut_answer_is_truncated_not_invalid() -> None:
    """An answer cut by max_tokens has its raw text, no data and an error that says what to do."""
    fake = service_answering('{"name": ', '"An', 'n"}')

    _, body = post(fake, schema=PERSON, max_tokens=2)

    assert (body["data"], body["valid"], body["finish_reason"]) == (None, False, "length")
    assert body["raw"] == '{"name": "An'
    assert [error["code"] for error in body["errors"]] == ["truncated"]
    assert "max_tokens" in body["errors"][0]["message"]


def test_a_cut_number_is_truncated() -> None:
    """A number cut after "12" parses, but it is not complete."""
    _, body = post(service_answering("12", "34"), schema={"type": "integer"}, max_tokens=1)

    assert (body["data"], body["errors"][0]["code"]) == (None, "truncated")


@pytest.mark.parametrize(
    ("raw", "data"),
    [("123456789012345678901234567890", 123456789012345678901234567890), ("1.50", 1.5), ('"\\ud83d\\ude00"', "😀")],
)
def test_numbers_and_characters_are_not_changed(raw: str, data: Any) -> None:
    """This includes long numbers and surrogate pairs."""
    status, body = post(service_answering(raw), schema={})

    assert (status, body["data"], body["valid"]) == (200, data, True)


@pytest.mark.parametrize("raw", ['"\\ud83d"', "1" * 5000, "[" * 2000 + "]" * 2000, "no json"])
def test_an_answer_that_is_not_json_is_not_a_500(raw: str) -> None:
    """Half a surrogate pair, a number over Python's limit and deep nesting are reported as not_json."""
    status, body = post(service_answering(raw), schema={})

    assert (status, body["valid"], body["raw"]) == (200, False, raw)
    assert body["errors"][0]["code"] == "not_json"


def test_a_stream_has_deltas_and_then_the_extraction() -> None:
    """Deltas add up to `raw`; the last event equals the non-streaming answer."""
    status, stream = post(service_answering('{"name": "Ann"', ', "age": 31}'), schema=PERSON, stream=True)

    *deltas, last, done = [frame.removeprefix("data: ") for frame in stream.split("\n\n") if frame]
    final = json.loads(last)
    assert (status, done) == (200, "[DONE]")
    assert "".join(json.loads(delta)["delta"] for delta in deltas) == final["raw"]
    assert {json.loads(delta)["object"] for delta in deltas} == {"extraction.delta"}
    assert {json.loads(delta)["id"] for delta in deltas} == {final["id"]}
    assert (final["object"], final["data"], final["valid"]) == ("extraction", {"name": "Ann", "age": 31}, True)


def test_documents_share_a_prompt_prefix() -> None:
    """Task, schema and instructions come first, then examples as turns, then the text."""
    fake = service_answering("{}")
    example = {"text": "Bob is 4.", "data": {"name": "Bob", "age": 4}}

    post(fake, schema=PERSON, instructions="Ages in years.", examples=[example])
    first = prompt(fake)
    post(fake, schema=PERSON, instructions="Ages in years.", examples=[example], text="Other.")

    assert first.index("Ages in years.") < first.index("Bob is 4.") < first.index("Ann is 31.")
    assert '<|im_start|>assistant\n{"name": "Bob", "age": 4}<|im_end|>' in first
    shared = first[: first.index("Ann is 31.")]
    assert prompt(fake).startswith(shared)


def test_response_format_may_hold_the_schema() -> None:
    """This is OpenAI's way to pass a schema."""
    fake = service_answering("{}")

    post(fake, schema=PERSON)
    post(fake, response_format={"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}})

    first, second = fake.engine.requests
    assert first.grammar == second.grammar
    assert first.prompt == second.prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": None}, "text"),
        ({"schema": []}, "schema"),
        ({"schema": {"type": "foo"}}, "schema"),
        ({"schema": {"uniqueItems": True}}, "schema"),
        ({"schema": {"$ref": "http://127.0.0.1:9/"}}, "schema"),
        ({"schema": {"$schema": "http://127.0.0.1:9/"}}, "schema"),
        ({"schema": {"type": "object", "required": 5}}, "schema"),
        ({"schema": {}, "response_format": {"type": "json_object", "schema": {}}}, None),
        ({"schema": {}, "response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}}, "schema"),
        ({"response_format": {"type": "text"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"examples": [{"text": "a"}]}, "examples[0].data"),
        ({"examples": [{"text": "a", "data": json.loads("[" * 99 + "]" * 99)}]}, "examples[0].data"),
        ({"examples": [{"text": "a", "data": 1}] * 33}, "examples"),
        ({"text": "x" * 3000}, "text"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_bad_extraction_is_a_400_that_names_it(fields: dict[str, Any], param: str | None) -> None:
    """No reference is fetched and no token is generated."""
    fake = service_answering("{}")

    status, body = post(fake, **fields)

    if param is None:  # the same schema twice is no contradiction
        assert status == 200
        return
    assert (status, body["error"]["param"]) == (400, param)
    assert fake.engine.requests == []


def test_an_unknown_model_is_not_found() -> None:
    """Extraction accepts the same model names as chat."""
    status, body = post(service_answering("{}"), model="other")

    assert (status, body["error"]["code"]) == (404, "model_not_found")
