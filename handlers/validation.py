"""Explain why a request body is invalid: the field, the values that it may have, and the value that it had."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from core.errors import InvalidRequest

_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_KEY_WHERE = re.compile(r"^(?P<what>.*) - at `key in \$(?P<path>.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")


def explain(message: str, body: bytes, kind: Any) -> InvalidRequest:
    """Return an error that names the invalid field, what it may be and what it was.

    msgspec's message has the field's path. What is allowed comes from the type, what was given from the body.
    """
    from msgspec import inspect

    match = _KEY_WHERE.match(message) or _WHERE.match(message)
    assert match is not None
    what, path = match["what"], match["path"] or ""
    declared: Any = inspect.type_info(kind)
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = msgspec.UNSET  # the body is also invalid JSON further on, where msgspec did not get to
    for step in _STEP.finditer(path):
        declared, value = _into(declared, value, step)
    param = path.removeprefix(".") or None

    if field := re.search(r"missing required field `(.+)`", what):
        name = f"{param}.{field[1]}" if param else field[1]
        kind_of_field = _field(declared, field[1], value)
        return InvalidRequest(f"'{name}' is missing; it must be {_allowed(kind_of_field)}.", param=name)
    if field := re.search(r"unknown field `(.+)`", what):
        name = f"{param}.{field[1]}" if param else field[1]
        allowed = ", ".join(_names(declared))
        return InvalidRequest(f"'{name}' is not a field of this request; allowed: {allowed}.", param=name)
    subject = f"'{param}'" if param else "The body"
    if what == "Number out of range":
        return InvalidRequest(f"{subject} must be {_allowed(declared)}; the number given is out of range.", param=param)
    got = "" if value is msgspec.UNSET else f", got {_shown(value)}"
    return InvalidRequest(f"{subject} must be {_allowed(declared)}{got}.", param=param)


def _members(declared: Any) -> tuple[Any, ...]:
    return tuple(getattr(declared, "types", (declared,)))


def _into(declared: Any, value: Any, step: re.Match[str]) -> tuple[Any, Any]:
    """Go one step down the path, in the type and in the value."""
    name, index, anything = step.groups()
    if name is not None:
        inner = value.get(name, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
        return _field(declared, name, value), inner
    if index is not None:
        inside = isinstance(value, list) and int(index) < len(value)
        items = [member.item_type for member in _members(declared) if hasattr(member, "item_type")]
        return (items[0] if items else None), (value[int(index)] if inside else msgspec.UNSET)
    assert anything
    values = [member.value_type for member in _members(declared) if hasattr(member, "value_type")]
    return (values[0] if values else None), msgspec.UNSET


def _structs(declared: Any, value: Any) -> list[Any]:
    """Return the structs that `declared` may be. For a tagged union, return the one whose tag `value` has, if any."""
    structs = [member for member in _members(declared) if hasattr(member, "fields")]
    if isinstance(value, dict):
        tagged = [struct for struct in structs if struct.tag_field and value.get(struct.tag_field) == struct.tag]
        return tagged or structs
    return structs


def _field(declared: Any, name: str, value: Any) -> Any:
    for struct in _structs(declared, value):
        for field in struct.fields:
            if field.encode_name == name:
                return field.type
    tags = [struct.tag for struct in _structs(declared, value) if struct.tag_field == name]
    return tuple(tags) if tags else None


def _names(declared: Any) -> list[str]:
    return [field.encode_name for struct in _structs(declared, None) for field in struct.fields]


def _allowed(declared: Any) -> str:
    """Describe a declared type, e.g. "a number from 0 to 2 or null"."""
    if declared is None:
        return "something else"
    if isinstance(declared, tuple):
        return "one of " + ", ".join(f"'{tag}'" for tag in declared)
    parts: list[str] = []
    for member in _members(declared):
        word = _word(member)
        if word not in parts:
            parts.append(word)
    return " or ".join(sorted(parts, key=lambda part: part == "null"))


def _word(declared: Any) -> str:
    match type(declared).__name__:
        case "IntType":
            return "a whole number" + _range(declared)
        case "FloatType":
            return "a number" + _range(declared)
        case "StrType":
            return "a string" + _lengths(declared, "characters")
        case "BoolType":
            return "true or false"
        case "NoneType":
            return "null"
        case "LiteralType":
            return "one of " + ", ".join(f"'{value}'" for value in declared.values)
        case "ListType" | "VarTupleType" | "CollectionType":
            return "an array" + _lengths(declared, "items")
        case "StructType" | "DictType":
            return "an object"
        case "Metadata":
            return _word(declared.type)
        case _:
            return "a JSON value"


def _range(declared: Any) -> str:
    least = declared.ge if declared.ge is not None else declared.gt
    most = declared.le if declared.le is not None else declared.lt
    low = "" if least is None else f"above {least:g}" if declared.ge is None else f"{least:g}"
    high = "" if most is None else f"below {most:g}" if declared.le is None else f"{most:g}"
    if low and high:
        return f" from {low} to {high}" if declared.ge is not None else f" {low} and up to {high}"
    if low:
        return f" {low}" if declared.ge is None else f" of at least {low}"
    return f" {high}" if declared.le is None and high else f" of at most {high}" if high else ""


def _lengths(declared: Any, unit: str) -> str:
    least, most = getattr(declared, "min_length", None), getattr(declared, "max_length", None)
    if least and most is not None:
        return f" of {least} to {most} {unit}"
    if least:
        return f" of at least {least} {unit}"
    return f" of at most {most} {unit}" if most is not None else ""


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list():
            return f"an array of {len(value)}"
        case str():
            return repr(value if len(value) <= 40 else value[:40] + "…")
        case _:
            text = str(value)
            return text if len(text) <= 40 else "a very long number"
