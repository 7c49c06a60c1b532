"""`decode` validates request bodies and names what is wrong."""

from typing import Annotated, Literal

import pytest
from msgspec import Meta, Struct

from core.errors import InvalidRequest
from handlers.http import Request, decode


class System(Struct, tag_field="role", tag="system"):
    content: str


class User(Struct, tag_field="role", tag="user"):
    content: str | list[str]


class ChatBody(Struct):
    messages: list[System | User]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    n: Annotated[int, Meta(ge=1)] = 1
    effort: Literal["low", "high"] = "low"
    stop: Annotated[list[str], Meta(max_length=2)] | None = None
    bias: dict[str, float] | None = None
    stream: bool | None = None


class Closed(Struct, forbid_unknown_fields=True):
    repo: str
    stream: bool = False


def error_of(body: bytes | str, kind: type = ChatBody) -> tuple[str, str | None]:
    raw = body if isinstance(body, bytes) else body.encode()
    with pytest.raises(InvalidRequest) as caught:
        decode(Request("POST", "/", "id", body=raw), kind)
    assert caught.value.status == 400
    return caught.value.message, caught.value.param


def test_unknown_fields_are_ignored() -> None:
    """SDKs send fields that this server does not have yet."""
    decoded = decode(Request("POST", "/", "id", body=b'{"messages": [], "brand_new": {"x": 1}}'), ChatBody)

    assert ChatBody(messages=[]) == decoded


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ('{"messages": 3}', "'messages' must be an array, got 3.", "messages"),
        ("{}", "'messages' is missing; it must be an array.", "messages"),
        ("[]", "The body must be an object, got an array of 0.", None),
        (
            '{"messages": [], "temperature": 9}',
            "'temperature' must be a number from 0 to 2 or null, got 9.",
            "temperature",
        ),
        (
            '{"messages": [], "temperature": "1"}',
            "'temperature' must be a number from 0 to 2 or null, got '1'.",
            "temperature",
        ),
        ('{"messages": [], "n": 0}', "'n' must be a whole number of at least 1, got 0.", "n"),
        ('{"messages": [], "n": 1.5}', "'n' must be a whole number of at least 1, got 1.5.", "n"),
        ('{"messages": [], "effort": "huge"}', "'effort' must be one of 'high', 'low', got 'huge'.", "effort"),
        (
            '{"messages": [], "stop": ["a", "b", "c"]}',
            "'stop' must be an array of at most 2 items or null, got an array of 3.",
            "stop",
        ),
        ('{"messages": [], "bias": {"5": "x"}}', "'bias[...]' must be a number.", "bias[...]"),
        ('{"messages": [], "stream": "yes"}', "'stream' must be true or false or null, got 'yes'.", "stream"),
        (
            '{"messages": [{"role": "wizard", "content": ""}]}',
            "'messages[0].role' must be one of 'system', 'user', got 'wizard'.",
            "messages[0].role",
        ),
        (
            '{"messages": [{"role": "user", "content": 7}]}',
            "'messages[0].content' must be a string or an array, got 7.",
            "messages[0].content",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}',
            "'messages[1].content' is missing; it must be a string or an array.",
            "messages[1].content",
        ),
        (
            '{"messages": [{"content": "a"}]}',
            "'messages[0].role' is missing; it must be one of 'system', 'user'.",
            "messages[0].role",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_allowed_values(body: str, message: str, param: str | None) -> None:
    """The message holds the value and what is allowed; `param` is the field's path."""
    assert (message, param) == error_of(body)


def test_a_closed_type_refuses_unknown_fields() -> None:
    """Otherwise a misspelt option of /load would be ignored silently."""
    expected = ("'rep' is not a field of this request; allowed: repo, stream.", "rep")

    assert expected == error_of('{"rep": "x"}', Closed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is empty; send a JSON object."),
        (b"  \n", "The body is empty; send a JSON object."),
        (b"{", "The body is not valid JSON: input data was truncated."),
        (b'{"messages": [],}', "The body is not valid JSON: trailing comma in object (byte 16)."),
        (b'{"messages": [] "n": 1}', "The body is not valid JSON: expected ',' or '}' (byte 16)."),
        (b'{"messages": [], "temperature": NaN}', "The body is not valid JSON: invalid character (byte 32)."),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "The body is not valid UTF-8."),
    ],
)
def test_invalid_json_is_a_400_with_the_position(body: bytes, message: str) -> None:
    """Syntax errors and invalid UTF-8 never become a 500."""
    assert (message, None) == error_of(body)


@pytest.mark.parametrize("body", [b'{"x":' + b"[" * 100_000, b'{"messages": [' + b'{"role":"user","content":["' * 9])
def test_a_deeply_nested_or_cut_body_is_a_400(body: bytes) -> None:
    """Deep nesting cannot exhaust the stack."""
    message, param = error_of(body)

    assert message.startswith("The body is")
    assert param is None


@pytest.mark.parametrize("number", ["1e999", "9" * 400])
def test_a_number_out_of_range_is_a_400(number: str) -> None:
    """The message names the field and does not repeat 400 digits."""
    message, param = error_of(f'{{"messages": [], "temperature": {number}}}')

    assert param == "temperature"
    assert len(message) < 120


def test_a_long_value_is_shortened_in_the_message() -> None:
    """A message stays short whatever the client sends."""
    message, _ = error_of('{"messages": [], "effort": "' + "x" * 5000 + '"}')

    assert len(message) < 120
