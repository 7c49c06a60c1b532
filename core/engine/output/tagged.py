"""Read arguments in tags, as Qwen's coders write them, and pass them on as JSON text.

A value stands between `<parameter=KEY>` and `</parameter>`. Strings are raw, so the tool's schema decides which values
are strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from core.engine.output import literals
from core.engine.output.source import Mismatch, Out, Reading, Source, Targets, escape

FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="

_KEY = re.compile(r"[^>\n\ud800-\udfff]+")
_ENDS = Targets(["\n</parameter>", "</parameter>"])
_MAX_REFERENCES = 16  # a schema may refer to itself


def arguments(source: Source, schema: Mapping[str, Any], out: Out, *, end: str) -> Reading[None]:
    """Read the parameters of a call and the end of its function. `end` is what else ends it: the call's closer."""
    begun = False
    while True:
        yield from source.spaces()
        if (yield from source.literal(FUNCTION_END)) or (yield from source.literal(end)):
            out("}" if begun else "{}")
            return
        if not (yield from source.literal(PARAMETER)):
            raise Mismatch
        key = yield from source.word(_KEY)
        yield from source.expect(">")
        out(f"{', ' if begun else '{'}{json.dumps(source.plain(key), ensure_ascii=False)}: ")
        begun = True
        yield from _value(source, types(schema, key), out, end)


def types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """Return the JSON types that a schema allows for one property. Empty if it does not say."""
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(found, schema, _MAX_REFERENCES))


def _types(schema: object, root: Mapping[str, Any], references: int) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    allowed: set[str] = set()
    kind = schema.get("type")
    if isinstance(kind, str):
        allowed.add(kind)
    elif isinstance(kind, list):
        allowed.update(name for name in kind if isinstance(name, str))
    elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        allowed.update(_type_of(value) for value in values)
    elif references:
        nested = [part for name in ("anyOf", "oneOf", "allOf") for part in schema.get(name) or ()]
        for part in [*nested, _resolve(schema.get("$ref"), root)]:
            allowed |= _types(part, root, references - 1)
    return allowed


def _type_of(value: object) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "null" if value is None else "array" if isinstance(value, list) else "object"


def _resolve(reference: object, root: Mapping[str, Any]) -> object:
    """Return what a reference inside the schema, such as "#/$defs/City", refers to."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    place: object = root
    for name in reference[2:].split("/"):
        place = place.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place


def _value(source: Source, allowed: frozenset[str], out: Out, end: str) -> Reading[None]:
    yield from source.literal("\n")
    if allowed == {"string"}:
        out('"')
        yield from _raw(source, lambda text: out(escape(source.plain(text))), end)
        out('"')
        return
    parts: list[str] = []
    yield from _raw(source, parts.append, end)
    out(_json(source.plain("".join(parts)), allowed))


def _raw(source: Source, out: Out, end: str) -> Reading[None]:
    """Read up to `</parameter>`. One that no further parameter and no end follows belongs to the value."""
    while True:
        read = yield from source.until(_ENDS, out)
        read += yield from source.spaces()
        for tag in (PARAMETER, FUNCTION_END, end):
            if (yield from source.follows(tag)):
                return
        out(read)


def _json(text: str, allowed: frozenset[str]) -> str:
    """Return a value as JSON text: as it stands if it is a value of an allowed type, else as a string."""
    literal = literals.literal_of(text)
    string = json.dumps(text, ensure_ascii=False)
    if literal is None:
        return string
    if not allowed:
        return literal
    kind = _type_of(json.loads(literal))
    if kind in allowed or (kind == "number" and "integer" in allowed):
        return string if kind == "string" else literal
    return string if "string" in allowed else literal
