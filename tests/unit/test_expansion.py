"""Expansion: schemas whose references multiply, and answers that a recursive schema cannot validate in time."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import extract
from core.engine.grammar import json_schema as constraints
from core.engine.grammar.expansion import MAX_CHECKS, MAX_SUBSCHEMAS, Expansion
from core.errors import InvalidRequest


def chain(links: int, keyword: str = "allOf", width: int = 2) -> dict[str, Any]:
    """Return a schema in which each definition refers `width` times to the next: width^links subschemas."""
    schemas: dict[str, Any] = {f"a{at}": {keyword: [{"$ref": f"#/$defs/a{at + 1}"}] * width} for at in range(links)}
    return {"$defs": {**schemas, f"a{links}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def count_naively(schema: Any, root: dict[str, Any]) -> int:
    """Count subschemas by following every reference, as a validator does."""
    if not isinstance(schema, dict):
        return 1
    total = 1
    for keyword, value in schema.items():
        if keyword == "$ref":
            total += count_naively(root["$defs"][value.removeprefix("#/$defs/")], root)
        elif keyword in ("allOf", "anyOf", "prefixItems"):
            total += sum(count_naively(inner, root) for inner in value)
        elif keyword in ("properties", "patternProperties"):
            total += sum(count_naively(inner, root) for inner in value.values())
        elif keyword in ("items", "additionalProperties"):
            total += count_naively(value, root)
    return total


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "prefixItems"])
@pytest.mark.parametrize("links", [14, 40, 900])
def test_multiplying_references_are_refused(keyword: str, links: int) -> None:
    """A validator would need hours for these 2 kB; 64 KiB hold 900 links."""
    with pytest.raises(InvalidRequest, match=rf"subschemas once every \$ref is followed; at most {MAX_SUBSCHEMAS}"):
        constraints.grammar(chain(links, keyword), "schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": chain(14)["$defs"]["a0"]}, "$defs": chain(14)["$defs"]},
        {"type": "array", "items": {"$ref": "#/$defs/a0"}, "$defs": chain(14)["$defs"]},
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/a0"}, "$defs": chain(14)["$defs"]},
        {"type": "object", "patternProperties": {"^x": {"$ref": "#/$defs/a0"}}, "$defs": chain(14)["$defs"]},
        {"x-hidden": chain(14)["$defs"]["a0"], "$ref": "#/x-hidden", "$defs": chain(14)["$defs"]},
        {
            **chain(14),
            "$ref": "#start",
            "$defs": {**chain(14)["$defs"], "s": {"$anchor": "start", "$ref": "#/$defs/a0"}},
        },
    ],
)
def test_multiplying_references_are_refused_anywhere(schema: dict[str, Any]) -> None:
    """Properties, items, annotations and anchors are followed."""
    with pytest.raises(InvalidRequest, match="subschemas once"):
        constraints.grammar(schema, "schema")


def test_shared_definitions_are_allowed() -> None:
    """Fifty references to one definition are fine, and so are recursive lists and trees."""
    address = {"type": "object", "properties": {f"line{at}": {"type": "string"} for at in range(20)}}
    shared = {
        "type": "object",
        "properties": {f"p{at}": {"$ref": "#/$defs/address"} for at in range(50)},
        "$defs": {"address": address},
    }
    tree = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "left": {"$ref": "#/$defs/t"}, "right": {"$ref": "#/$defs/t"}},
        "$defs": {"t": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    }

    assert constraints.grammar(shared, "schema")
    assert constraints.grammar(tree, "schema")
    assert Expansion(tree).recursive
    assert not Expansion(shared).recursive


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"p": {"$id": "https://a.example/b", "type": "string"}}},
        {"x-a": {"$id": "https://a.example/b", "b": {"type": "string"}}, "$ref": "#/x-a/b"},
        {"$ref": "#twice", "$defs": {"a": {"$anchor": "twice"}, "b": {"$anchor": "twice"}}},
        {"$ref": "#/$defs/none"},
    ],
)
def test_ambiguous_references_are_refused(schema: dict[str, Any]) -> None:
    """A reference that cannot be followed cannot be counted."""
    with pytest.raises(InvalidRequest, match="cannot be enforced"):
        constraints.grammar(schema, "schema")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_subschemas_are_counted_as_by_following_every_reference(data: st.DataObject) -> None:
    """The schemas are random and not recursive: definitions refer to later ones only."""
    count = data.draw(st.integers(1, 6))

    def subschema(after: int, depth: int) -> Any:
        kinds = ["leaf", "ref", *(["allOf", "properties", "items"] if depth else [])]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "ref" and after < count:
            return {"$ref": f"#/$defs/d{data.draw(st.integers(after, count - 1))}"}
        if kind == "allOf":
            return {"allOf": [subschema(after, depth - 1) for _ in range(data.draw(st.integers(1, 3)))]}
        if kind == "properties":
            return {"properties": {name: subschema(after, depth - 1) for name in "ab"}}
        return {"items": subschema(after, depth - 1)} if kind == "items" else {"type": "string"}

    definitions = {f"d{at}": subschema(at + 1, 2) for at in range(count)}
    root = {"$ref": "#/$defs/d0", "$defs": definitions}

    assert Expansion(root).subschemas == count_naively(root, root)


def test_an_answer_that_takes_too_many_checks_is_not_validated() -> None:
    """Two alternatives per level take 2^depth checks. The error is "unchecked" and comes at once."""
    node = {"type": "object", "properties": {"next": {"$ref": "#"}, "kind": {"const": 1}}, "required": ["next"]}
    other = {**node, "properties": {"next": {"$ref": "#"}, "kind": {"const": 2}}}
    schema = {"anyOf": [node, other, {"type": "null"}]}
    deep: Any = None
    for _ in range(60):
        deep = {"next": deep, "kind": 3}
    began = time.monotonic()

    data, errors = extract._validate(json.dumps(deep), schema, "stop")

    assert [error.code for error in errors] == ["unchecked"]
    assert str(MAX_CHECKS) in errors[0].message
    assert json.loads(bytes(data)) == deep
    assert time.monotonic() - began < 5  # validation would take 2^60 steps


def test_an_ordinary_recursive_schema_is_validated() -> None:
    """A list of a hundred links takes linear time, and errors in it are reported."""
    schema = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v"],
    }
    linked: Any = None
    for value in range(100):
        linked = {"v": value, "next": linked}

    assert extract._validate(json.dumps(linked), schema, "stop")[1] == []
    assert [error.code for error in extract._validate(json.dumps({"v": "x"}), schema, "stop")[1]] == ["schema"]
