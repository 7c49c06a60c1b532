"""Constraints: JSON Schema to llguidance grammars. Nothing is dropped silently: what cannot be enforced is refused.

Separators are fixed (", " and ": ", no other white space), so that more of an answer is forced by the grammar and needs
no sampling, and an object ends with its brace.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgspec

from core.engine.grammar.expansion import MAX_SUBSCHEMAS, Expansion, Unresolvable
from core.errors import InvalidRequest

MAX_BYTES = 1 << 16
MAX_DEPTH = 64  # nested arrays and objects in the schema's JSON; llguidance's parser ends at 128

# What llguidance compiles (docs/json_schema.md of llguidance 1.9), and what says nothing about the value.
_SUPPORTED = frozenset(
    (
        *("$ref", "$defs", "definitions", "type", "enum", "const", "allOf", "anyOf", "oneOf"),
        *("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
        *("items", "additionalItems", "prefixItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
_ANNOTATIONS = frozenset(
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "example"),
        *("deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
    )
)
_MAPS = frozenset(("$defs", "definitions", "properties", "patternProperties"))
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_SINGLE = frozenset(("additionalProperties", "items", "additionalItems"))


def grammar(schema: dict[str, Any], field: str) -> str:
    """The grammar that lets through exactly what `schema` allows, properties in the schema's order.

    Blocks, for large schemas up to a second; the last 64 are kept. Raises InvalidRequest, `param` being `field`, for a
    schema that is too large, wrong, unsatisfiable, or uses what cannot be enforced, which it names.
    """
    if _depth_beyond(schema, MAX_DEPTH):
        raise InvalidRequest(f"'{field}': the schema may be nested at most {MAX_DEPTH} deep.", param=field)
    text = msgspec.json.encode(schema)
    if len(text) > MAX_BYTES:
        raise InvalidRequest(
            f"'{field}': the schema has {len(text)} bytes as JSON; at most {MAX_BYTES} are allowed.", param=field
        )
    for keyword, where in _foreign(schema):
        raise InvalidRequest(
            f"'{field}': the JSON Schema keyword {keyword[:60]!r} at {where[:200]} is not supported and would not be "
            "enforced; leave it out.",
            param=field,
        )
    _check_size(schema, field)
    problem, compiled = _compile(text.decode())
    if problem is not None:
        raise InvalidRequest(f"'{field}': the schema cannot be enforced: {problem}", param=field)
    return compiled


def _check_size(schema: dict[str, Any], field: str) -> None:
    """Refuse a schema whose references multiply: neither its compilation nor the validation would end."""
    try:
        subschemas = Expansion(schema).subschemas
    except Unresolvable as error:
        raise InvalidRequest(f"'{field}': the schema cannot be enforced: {error}.", param=field) from None
    if subschemas > MAX_SUBSCHEMAS:
        shown = f"{subschemas}" if subschemas < 10**12 else "more than 10^12"
        raise InvalidRequest(
            f"'{field}': the schema has {shown} subschemas once every $ref is followed; at most {MAX_SUBSCHEMAS} are "
            "allowed. Refer to shared definitions from fewer places.",
            param=field,
        )


@functools.lru_cache(maxsize=64)
def _compile(schema: str) -> tuple[str | None, str]:
    """(what is wrong, the grammar). llguidance words its findings for the schema's author: a line is passed on."""
    from llguidance import LLMatcher

    options = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": False,
        "coerce_one_of": False,
    }
    try:
        compiled: str = LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError:
        return "it is not a JSON Schema.", ""
    wrong, findings = LLMatcher.validate_grammar_with_warnings(compiled)
    if wrong:
        lines = [line.strip() for line in str(findings[0]).splitlines() if line.strip()]
        return (lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}")[:300], ""
    return None, compiled


def _foreign(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keywords that are neither enforced nor mere annotations, with the JSON pointer of their place.

    Also words JSON Schema does not know: "minLenght" or OpenAPI's "nullable" would be ignored as annotations.
    """
    waiting: list[tuple[Any, str]] = [(schema, "#")]
    while waiting:
        one, where = waiting.pop()
        if not isinstance(one, dict):
            continue  # true, false, or wrong: the compiler says so
        for keyword, value in one.items():
            place = f"{where}/{keyword}"
            waiting += [(inner, f"{place}/{name}" if name else place) for name, inner in _inside(keyword, value)]
            if keyword == "$ref" and not str(value).startswith("#"):
                yield f"$ref to {value}", where
            elif keyword not in _SUPPORTED and keyword not in _ANNOTATIONS and not _is_extension(keyword):
                yield keyword, where


def _inside(keyword: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas under a keyword, each with its name in the JSON pointer. What is misplaced the compiler refuses."""
    if keyword in _MAPS and isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list) and (keyword in _LISTS or keyword == "items"):
        yield from ((str(index), inner) for index, inner in enumerate(value))
    elif keyword in _SINGLE:
        yield "", value


def _is_extension(keyword: str) -> bool:
    """OpenAPI's "x-" annotations; llguidance's own would change how it compiles."""
    return keyword.startswith("x-") and keyword != "x-guidance"


def _depth_beyond(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True
