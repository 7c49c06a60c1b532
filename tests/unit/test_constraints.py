import json
from typing import Any

import pytest

from core.engine.grammar import json_schema as constraints
from core.errors import InvalidRequest

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte and an end token."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<eos>")
        special_token_ids = (256,)

        def __call__(self, text: Any) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return LLTokenizer(TokenizerWrapper(Bytes()))


def accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether the grammar accepts `text` and allows the end token after it."""
    from llguidance import LLMatcher

    matcher = LLMatcher(byte_tokenizer(), constraints.grammar(schema, "schema"))
    assert not matcher.is_error(), matcher.get_error()
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and bool(matcher.is_accepting())


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (PERSON, ['{"name": "A", "age": 7}'], ['{"age": 7, "name": "A"}', '{"name": "A"}']),
        (PERSON, ['{"name": "", "age": 150}'], ['{"name": "A", "age": 151}', '{"name": "A", "age": 1.5}']),
        (PERSON, [], ['{"name":"A","age":7}', '{ "name": "A", "age": 7}', '{"name": "A", "age": 7, "x": 1}']),
        ({"type": "object"}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "{", '{"a": 1} ']),
        ({"enum": ["a", 1, None]}, ['"a"', "1", "null"], ['"b"', "2"]),
        ({"const": {"a": 1}}, ['{"a": 1}'], ["{}"]),
        ({"type": ["string", "null"], "maxLength": 2}, ['"ab"', "null"], ['"abc"', "1"]),
        ({"type": "string", "pattern": "^[a-z]+$"}, ['"abc"'], ['"ABC"', '""']),
        ({"type": "string", "pattern": "b"}, ['"abc"'], ['"ac"']),
        ({"type": "string", "format": "date"}, ['"2026-11-22"'], ['"soon"']),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, ["0.5", "0"], ["1", "-0.1"]),
        ({"type": "integer", "multipleOf": 5}, ["15"], ["16"]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, ["[1]", "[1, 2]"], ["[]"]),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, ["true", "null"], ["1"]),
        ({"allOf": [{"type": "string"}, {"maxLength": 1}]}, ['"a"'], ['"ab"', "1"]),
        (
            {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
            ["[[], [[]]]"],
            ["[1]"],
        ),
        ({"title": "T", "x-order": 1, "default": 1, "examples": [1], "type": "integer"}, ["1"], ['"1"']),
    ],
)  # fmt: skip
def test_the_grammar_accepts_what_the_schema_allows(schema: dict[str, Any], yes: list[str], no: list[str]) -> None:
    """Properties come in the schema's order and white space is fixed. Other texts are rejected."""
    assert [text for text in yes if not accepts(schema, text)] == []
    assert [text for text in no if accepts(schema, text)] == []


def test_an_object_ends_with_its_brace() -> None:
    """After the closing brace only the end token is allowed, so the model cannot emit endless white space."""
    from llguidance import LLMatcher

    matcher = LLMatcher(byte_tokenizer(), constraints.grammar(PERSON, "schema"))
    matcher.try_consume_tokens(list(b'{"name": "A", "age": 15}'))

    assert matcher.is_stopped()


def test_separators_and_names_are_forced() -> None:
    """Names and separators of required properties are not sampled."""
    from llguidance import LLMatcher

    matcher = LLMatcher(byte_tokenizer(), constraints.grammar(PERSON, "schema"))

    assert matcher.compute_ff_bytes() == b'{"name": "'


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' at #"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "'not' at #/properties/a"),
        ({"if": {}, "then": {}}, "'if' at #"),
        ({"anyOf": [{"type": "string"}, {"contains": {}}]}, "'contains' at #/anyOf/1"),
        ({"$defs": {"x": {"dependentRequired": {}}}}, "'dependentRequired' at #/$defs/x"),
        ({"type": "string", "minLenght": 3}, "'minLenght' at #"),
        ({"type": "string", "nullable": True}, "'nullable' at #"),
        ({"items": {"items": {"propertyNames": {}}}}, "'propertyNames' at #/items/items"),
        ({"prefixItems": [{"unevaluatedItems": False}]}, "'unevaluatedItems' at #/prefixItems/0"),
        ({"additionalProperties": {"patternProperties": {"a": {"$dynamicRef": "#x"}}}}, "'$dynamicRef' at"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance' at #"),
        ({"$ref": "http://example.com/schema.json"}, "'$ref to http://example.com/schema.json' at #"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "'$ref to file:///etc/passwd' at #/properties/a"),
    ],
)
def test_an_unsupported_keyword_is_refused_by_name(schema: dict[str, Any], keyword: str) -> None:
    """Unsupported, misspelt and foreign keywords are never ignored; the message names the keyword and its path."""
    with pytest.raises(InvalidRequest) as caught:
        constraints.grammar(schema, "schema")

    assert keyword in caught.value.message
    assert caught.value.param == "schema"


@pytest.mark.parametrize("name", ["not", "if", "uniqueItems", "minLenght"])
def test_properties_may_be_named_like_keywords(name: str) -> None:
    """Names of properties, enum values and examples are data, not keywords."""
    schema = {"type": "object", "properties": {name: {"enum": [{"not": 1}]}}, "default": {"if": 1}}

    assert accepts(schema, json.dumps({name: {"not": 1}}))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "string", "format": "zip"}, "Unknown format: zip"),
        ({"type": "string", "pattern": "["}, "unclosed character class"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"properties": {"a": 5}}, "schema must be an object or boolean"),
        ({"anyOf": []}, "anyOf is empty"),
        ({"properties": []}, "cannot be enforced"),
        ({"allOf": 5}, "cannot be enforced"),
        ({"prefixItems": {"a": 1}}, "cannot be enforced"),
    ],
)
def test_an_invalid_schema_is_refused(schema: dict[str, Any], words: str) -> None:
    """An invalid or unsatisfiable schema is a 400 with the reason."""
    with pytest.raises(InvalidRequest) as caught:
        constraints.grammar(schema, "response_format")

    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.param == "response_format"


def test_a_deep_schema_is_refused() -> None:
    """Nesting is limited in schemas and their data, far below a depth that could break a parser."""
    for key in ("items", "const"):
        schema: dict[str, Any] = {}
        for _ in range(5000):
            schema = {key: schema}
        with pytest.raises(InvalidRequest, match="at most 64 deep"):
            constraints.grammar(schema, "schema")


def test_a_large_schema_is_refused() -> None:
    """The message holds the size and the limit."""
    with pytest.raises(InvalidRequest, match=r"has 1\d{5} bytes as JSON; at most 65536"):
        constraints.grammar({"enum": ["x" * 100_000]}, "schema")
