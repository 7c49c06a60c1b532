"""Compile JSON Schemas to llguidance grammars. A keyword that cannot be enforced is an error, never ignored.

Separators are fixed (", " and ": ", no other white space). So the grammar forces more of an answer, which then needs no
sampling, and an object ends with its brace.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgspec

from core.engine.grammar.expansion import MAX_SUBSCHEMAS, Expansion, Unresolvable
from core.errors import InvalidRequest

MAX_BYTES = 1 << 16
MAX_DEPTH = 64  # nested arrays and objects in the schema's JSON; llguidance's parser allows 128
OPTIONS = {  # of llguidance
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}

# Keywords that llguidance compiles (docs/json_schema.md of llguidance 1.9), and those that do not restrict the value.
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
    """Return the grammar that accepts exactly what `schema` allows, with properties in the schema's order.

    Blocks, up to a second for a large schema. The last 64 grammars are cached. Raises InvalidRequest with `field` as
    its `param` for a schema that is too large, invalid, unsatisfiable, or has a keyword that cannot be enforced.
    """
    # 1) Size and depth, before anything walks the schema.
    if depth_beyond(schema, MAX_DEPTH):
        raise InvalidRequest(f"'{field}': the schema may be nested at most {MAX_DEPTH} deep.", param=field)
    text = msgspec.json.encode(schema)
    if len(text) > MAX_BYTES:
        raise InvalidRequest(
            f"'{field}': the schema has {len(text)} bytes as JSON; at most {MAX_BYTES} are allowed.", param=field
        )
    # 2) Keywords that llguidance would ignore.
    for keyword, where in unsupported(schema):
        raise InvalidRequest(
            f"'{field}': the JSON Schema keyword {keyword[:60]!r} at {where[:200]} is not supported and would not be "
            "enforced. Remove it.",
            param=field,
        )
    # 3) References that multiply.
    problem = expansion_problem(schema)
    if problem is not None:
        raise InvalidRequest(f"'{field}': {problem}", param=field)
    # 4) llguidance's own checks.
    problem, compiled = _compile(text.decode())
    if problem is not None:
        raise InvalidRequest(f"'{field}': the schema cannot be enforced: {problem}", param=field)
    return compiled


def expansion_problem(schema: dict[str, Any]) -> str | None:
    """Describe references that multiply: neither compiling such a schema nor validating with it would end."""
    try:
        subschemas = Expansion(schema).subschemas
    except Unresolvable as error:
        return f"the schema cannot be enforced: {error}."
    if subschemas > MAX_SUBSCHEMAS:
        shown = f"{subschemas}" if subschemas < 10**12 else "more than 10^12"
        return (
            f"the schema has {shown} subschemas once every $ref is followed; at most {MAX_SUBSCHEMAS} are allowed. "
            "Refer to shared definitions from fewer places."
        )
    return None


def compile_text(schema: str) -> tuple[str | None, str]:
    """Return (problem or None, grammar). llguidance writes its messages for the schema's author: pass one line on."""
    from llguidance import LLMatcher

    try:
        compiled: str = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError:
        return "it is not a JSON Schema.", ""
    failed, messages = LLMatcher.validate_grammar_with_warnings(compiled)
    if failed:
        lines = [line.strip() for line in str(messages[0]).splitlines() if line.strip()]
        return (lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}")[:300], ""
    return None, compiled


_compile = functools.lru_cache(maxsize=64)(compile_text)


def unsupported(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield keywords that are neither enforced nor annotations, each with the JSON pointer of its schema.

    This includes words that JSON Schema does not define: "minLenght" or OpenAPI's "nullable" would be ignored.
    """
    waiting: list[tuple[Any, str]] = [(schema, "#")]
    while waiting:
        subschema, where = waiting.pop()
        if not isinstance(subschema, dict):
            continue  # true, false, or invalid, which the compiler reports
        for keyword, value in subschema.items():
            place = f"{where}/{keyword}"
            waiting += [(inner, f"{place}/{name}" if name else place) for name, inner in subschemas(keyword, value)]
            if keyword == "$ref" and not str(value).startswith("#"):
                yield f"$ref to {value}", where
            elif not is_enforced(keyword):
                yield keyword, where


def is_enforced(keyword: str) -> bool:
    """Return whether a keyword is enforced, or is an annotation."""
    return keyword in _SUPPORTED or keyword in _ANNOTATIONS or _is_extension(keyword)


def subschemas(keyword: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas under a keyword, each with its name in the JSON pointer. The compiler checks their places."""
    if keyword in _MAPS and isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list) and (keyword in _LISTS or keyword == "items"):
        yield from ((str(index), inner) for index, inner in enumerate(value))
    elif keyword in _SINGLE:
        yield "", value


def _is_extension(keyword: str) -> bool:
    """Return whether this is an "x-" annotation, as in OpenAPI. llguidance's own would change how it compiles."""
    return keyword.startswith("x-") and keyword != "x-guidance"


def depth_beyond(value: Any, levels: int) -> bool:
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
