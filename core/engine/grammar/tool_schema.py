"""Prepare the parameters of tools for a grammar: what of a tool's JSON Schema is enforced, and its single parameters.

Agents' schemas are full of keywords that no grammar can enforce. For a strict tool such a keyword is an error. For any
other tool the keyword is left out of the grammar and logged; the prompt still shows it.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from core.engine.grammar import json_schema
from core.engine.output import tagged
from core.engine.output.families import Form
from core.engine.output.literals import literal_of
from core.errors import InvalidRequest

logger = logging.getLogger("slm.tools")

MAX_BYTES = json_schema.MAX_BYTES  # of one tool's parameters as JSON
MAX_TOTAL_BYTES = 8 * MAX_BYTES

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "array", "object"))
_COMPOSING = ("$ref", "allOf", "anyOf", "oneOf")
# A root with one of these says more about the names of members than `properties` does.
_OPEN = (*_COMPOSING, "patternProperties", "additionalProperties", "minProperties", "const", "enum")

# For strings that are written without quotes. Each is a subset of what the format allows.
_FORMATS = {
    "date": r"[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@[a-zA-Z0-9]+([.-][a-zA-Z0-9]+)*\.[a-zA-Z]{2,24}",
    "hostname": r"[a-zA-Z0-9]{1,60}(\.[a-zA-Z0-9]{1,60}){0,4}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
    "uri": r"[a-z]{2,12}:\/\/[a-zA-Z0-9]+([.-][a-zA-Z0-9]+)*(:[1-9][0-9]{1,3})?(\/[a-zA-Z0-9_.~-]+)*\/?",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"


class Tool(Protocol):
    """What a grammar needs to know about a tool."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def strict(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter. `schema` is the JSON text of its schema. `words` are alternatives, for a value that is no JSON."""

    key: str
    schema: str
    required: bool
    words: tuple[Words, ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """What a string may be: one of `values`, or of a length, and matched as a whole by each of the patterns."""

    values: tuple[str, ...] | None = None
    shortest: int = 0
    longest: int | None = None
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Members:
    """The parameters of a tool one by one, in the schema's order. `others` is the schema of those without a name."""

    named: tuple[Member, ...]
    others: str | None = None


def check(tools: Sequence[Tool], field: str) -> None:
    """Check the size and the schemas of tools. Blocks. Raises InvalidRequest (see `arguments`).

    `field` is the name of the i-th tool's parameters in error messages, e.g. "tools[{}].function.parameters".
    """
    for index, tool in enumerate(tools):
        arguments(tool, field.format(index))
    total = sum(len(msgspec.json.encode(tool.parameters)) for tool in tools)
    if total > MAX_TOTAL_BYTES:
        name = field.partition("[")[0]
        raise InvalidRequest(
            f"'{name}': the parameters of all tools have {total} bytes as JSON; at most {MAX_TOTAL_BYTES} are allowed.",
            param=name,
        )


def arguments(tool: Tool, field: str) -> str:
    """Return the JSON text of the schema that a grammar enforces for a tool's arguments.

    Raises InvalidRequest with `field` as its `param` for a schema that is too large or too deep, and for a strict tool
    whose schema has a keyword that cannot be enforced.
    """
    return _resolve(tool, field, "object").schema


def call(tool: Tool, field: str, name_key: str, arguments_key: str) -> str:
    """Return the JSON text of the schema of an object with the tool's name and arguments."""
    schema = json.loads(arguments(tool, field))
    del schema["x-guidance"]
    pair = {name_key: {"const": tool.name}, arguments_key: {"$ref": "#/$defs/tool"}}
    whole = {"type": "object", "properties": pair, "required": list(pair), "additionalProperties": False}
    return _text({**whole, "$defs": {"tool": _moved(schema)}})


def members(tool: Tool, field: str, form: Form) -> Members:
    """Return a tool's parameters one by one, for the forms "tagged", "python" and "braces".

    Raises InvalidRequest as `arguments` does.
    """
    prepared = _resolve(tool, field, form).members
    assert prepared is not None
    return prepared


def _resolve(tool: Tool, field: str, form: Form) -> _Prepared:
    # 1) Size and depth, before anything walks the schema.
    if json_schema.depth_beyond(dict(tool.parameters), json_schema.MAX_DEPTH):
        problem: str | None = f"its parameters may be nested at most {json_schema.MAX_DEPTH} deep."
    elif len(text := msgspec.json.encode(tool.parameters)) > MAX_BYTES:
        problem = f"its parameters have {len(text)} bytes as JSON; at most {MAX_BYTES} are allowed."
    # 2) Keywords.
    else:
        prepared = _prepare(tool.name, text.decode(), tool.strict, form)
        if prepared.problem is None:
            return prepared
        problem = prepared.problem
    raise InvalidRequest(f"'{field}': tool '{tool.name}': {problem}", param=field)


@dataclass(frozen=True, slots=True)
class _Prepared:
    schema: str = ""
    members: Members | None = None
    problem: str | None = None


@functools.lru_cache(maxsize=512)
def _prepare(name: str, text: str, strict: bool, form: Form) -> _Prepared:
    """Prepare one tool. Takes some milliseconds, mostly in llguidance."""
    root = _root(msgspec.json.decode(text))
    if strict:
        problem = _problem(root)
        if problem is not None:
            return _Prepared(problem=problem)
    else:
        root, dropped = _enforceable(root)
        if dropped:
            logger.info("The grammar of tool %r leaves out: %s", name[:64], ", ".join(dropped)[:500])
    schema = _text(root)
    if form not in ("tagged", "python", "braces"):
        return _Prepared(schema)
    split, unsplit = _split(root, form)
    if unsplit and strict:
        return _Prepared(problem=f"{unsplit[0]} cannot be enforced in the form in which this model calls tools.")
    if unsplit:
        logger.info("The grammar of tool %r leaves out: %s", name[:64], ", ".join(unsplit)[:500])
    return _Prepared(schema, split)


def _root(parameters: Any) -> dict[str, Any]:
    """Return the schema of an object. A schema that says nothing about its members means that there are none.

    Members that the schema does not name are not generated, unless it says that there are some: a call with one would
    fail in most programs.
    """
    if not isinstance(parameters, dict):
        return NO_ARGUMENTS
    root = {**parameters, "type": "object"}
    if any(root.get(keyword) for keyword in _OPEN):
        return root
    properties = root.get("properties")
    if not properties:
        return NO_ARGUMENTS
    required = root.get("required", ())
    if isinstance(properties, dict) and isinstance(required, list) and all(key in properties for key in required):
        root["additionalProperties"] = False
    return root


def _problem(root: dict[str, Any]) -> str | None:
    """Describe why a schema cannot be enforced, or return None."""
    for keyword, where in json_schema.unsupported(root):
        return (
            f"the JSON Schema keyword {keyword[:60]!r} at {where[:200]} is not supported and would not be enforced. "
            "Remove it, or set 'strict' to false."
        )
    problem = json_schema.expansion_problem(root)
    if problem is None:
        problem, _ = json_schema.compile_text(_text(root))
        if problem is not None:
            problem = f"the schema cannot be enforced: {problem}"
    return problem


def _enforceable(root: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what of a schema can be enforced, and the places of what is left out."""
    dropped: list[str] = []
    # 1) Single keywords.
    relaxed = _relaxed(root, "#", dropped)
    if _problem(relaxed) is None:
        return relaxed, dropped
    # 2) Whole parameters.
    properties = relaxed.get("properties")
    if isinstance(properties, dict):
        kept = {key: schema if _problem(_alone(relaxed, schema)) is None else {} for key, schema in properties.items()}
        dropped += [f"#/properties/{key}" for key, schema in properties.items() if kept[key] != schema]
        salvaged = {"type": "object", "properties": kept, "required": relaxed.get("required", [])}
        salvaged["additionalProperties"] = bool(relaxed.get("additionalProperties", True))
        if _problem(salvaged) is None:
            return salvaged, dropped
    # 3) Everything.
    return {"type": "object"}, ["the whole schema"]


def _relaxed(schema: Any, where: str, dropped: list[str]) -> Any:
    """Copy a schema without the keywords that cannot be enforced. Add their places to `dropped`."""
    if not isinstance(schema, dict):
        return schema
    relaxed: dict[str, Any] = {}
    for keyword, value in schema.items():
        if not _fits(keyword, value):
            dropped.append(f"{where}/{keyword}")
            continue
        inner = dict(json_schema.subschemas(keyword, value))
        if not inner:
            relaxed[keyword] = value
        elif isinstance(value, list):
            relaxed[keyword] = [_relaxed(each, f"{where}/{keyword}", dropped) for each in value]
        elif "" in inner and inner[""] is value:
            relaxed[keyword] = _relaxed(value, f"{where}/{keyword}", dropped)
        else:
            relaxed[keyword] = {
                name: _relaxed(each, f"{where}/{keyword}/{name}", dropped) for name, each in inner.items()
            }
    return relaxed


def _fits(keyword: str, value: Any) -> bool:
    """Return whether the grammar can enforce this keyword with this value."""
    if keyword == "$ref":
        return isinstance(value, str) and value.startswith("#")
    if keyword == "type":
        return bool(value) and all(isinstance(name, str) and name in _TYPES for name in _listed(value))
    if keyword == "required":  # agents also write "required": true at a parameter
        return isinstance(value, list)
    if keyword == "pattern":
        return isinstance(value, str) and _compiles({"type": "string", "pattern": value})
    if keyword == "format":
        return isinstance(value, str) and _compiles({"type": "string", "format": value})
    return json_schema.is_enforced(keyword)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _compiles(schema: dict[str, Any]) -> bool:
    return json_schema.compile_text(json.dumps(schema))[0] is None


def _alone(root: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Return the schema of one parameter as a document of its own. References into the tool's schema still work."""
    if not isinstance(schema, dict):
        return {} if schema is True else {"not": {}} if schema is False else schema
    if not any(True for _ in _references(schema)):
        return schema
    return {"allOf": [_moved(schema)], "$defs": {"tool": _moved(dict(root))}}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _moved(value: Any) -> Any:
    """Point references to the tool's schema at the copy of it in `$defs`."""
    if isinstance(value, dict):
        return {
            key: f"#/$defs/tool{inner[1:]}" if key == "$ref" and isinstance(inner, str) and _is_pointer(inner)
            else _moved(inner)
            for key, inner in value.items()
        }  # fmt: skip
    return [_moved(inner) for inner in value] if isinstance(value, list) else value


def _is_pointer(reference: str) -> bool:
    return reference == "#" or reference.startswith("#/")


def _split(root: dict[str, Any], form: Form) -> tuple[Members, list[str]]:
    """Return the parameters of an object one by one, and what of its schema this does not enforce."""
    properties, required, unsplit = _properties(root)
    # 1) Parameters that the schema names. The parser knows the types of those at its top.
    named_by_root = root.get("properties") or {}
    named = []
    for key, schema in properties.items():
        if schema is False:
            continue
        words, unfit = _words(root, key, form) if key in named_by_root else ((), None)
        if unfit is not None:
            unsplit.append(f"'{unfit}' of parameter '{key[:60]}'")
        named.append(Member(key, _text(_alone(root, schema)), key in required, words))
    others = root.get("additionalProperties", not named)
    # 2) Those that it only requires, and all others.
    named += [Member(key, _text({}), True) for key in sorted(required - properties.keys())]
    if others is False or (named and others is True):
        return Members(tuple(named)), unsplit
    return Members(tuple(named), _text({} if others is True else _alone(root, others))), unsplit


def _properties(root: dict[str, Any]) -> tuple[dict[str, Any], set[str], list[str]]:
    """Return the members of the root and of what it is composed of, the required ones, and what is not enforced."""
    properties: dict[str, Any] = {}
    required: set[str] = set()
    beyond = ("patternProperties", "minProperties", "maxProperties", "const", "enum", "anyOf", "oneOf")
    unsplit: list[str] = []
    visited: list[Any] = []
    waiting: list[tuple[Any, bool]] = [(root, True)]
    while waiting:
        schema, always = waiting.pop(0)
        if not isinstance(schema, dict) or any(schema is other for other in visited):
            continue
        visited.append(schema)
        unsplit += [f"'{keyword}' of the whole object" for keyword in beyond if keyword in schema]
        properties = {**(schema.get("properties") or {}), **properties}
        required.update(schema.get("required", ()) if always else ())
        composed = [_target(root, schema["$ref"])] if "$ref" in schema else []
        waiting += [(inner, always) for inner in (*composed, *schema.get("allOf", ()))]
        waiting += [(inner, False) for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    return properties, required, unsplit


def _target(root: Mapping[str, Any], reference: str) -> Any:
    """Follow a reference within the tool's schema. Returns None if it cannot be followed."""
    place: Any = root
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if isinstance(place, dict) else None
    return place


def _words(root: dict[str, Any], key: str, form: Form) -> tuple[tuple[Words, ...], str | None]:
    """Return what a parameter's text may be, where the form writes it without JSON's quotes. Empty: it is JSON.

    In tags, the parser takes text for a value of another type if the schema allows that type, else for a string. The
    second value is the keyword that cannot be enforced there.
    """
    allowed = tagged.types(root, key)
    if "string" not in allowed or form == "python" or (form == "braces" and len(allowed) > 1):
        return (), None
    words: list[Words] = []
    unfit = None
    for schema in _leaves(root, root["properties"][key], json_schema.MAX_DEPTH):
        types = _listed(schema.get("type", []))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            strings = [each for each in values if isinstance(each, str) and (len(allowed) == 1 or not _is_json(each))]
            words.append(Words((*strings, *(json.dumps(each) for each in values if not isinstance(each, str)))))
            continue
        if "string" in types:
            text, keyword = _text_words(schema)
            words.append(text)
            unfit = unfit or keyword
        words += [Words(("null",))] if "null" in types else []
        words += [Words(("true", "false"))] if "boolean" in types else []
        composed = [keyword for keyword in _COMPOSING if keyword in schema]
        unfit = unfit or (composed[0] if composed else None)
    return tuple(words) or (Words(),), unfit


def _leaves(root: Mapping[str, Any], schema: Any, depth: int) -> Iterator[dict[str, Any]]:
    """Yield the alternatives of a schema, with references followed."""
    if not isinstance(schema, dict) or not depth:
        return
    if "$ref" in schema:
        yield from _leaves(root, _target(root, schema["$ref"]), depth - 1)
        return
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if len(schema.get("allOf", ())) == 1:
        alternatives += schema["allOf"]
    if not alternatives or "type" in schema or "enum" in schema:
        yield schema
    else:
        for alternative in alternatives:
            yield from _leaves(root, alternative, depth - 1)


def _text_words(schema: Mapping[str, Any]) -> tuple[Words, str | None]:
    patterns: list[str] = []
    unfit = None
    if "pattern" in schema:
        pattern = _whole(schema["pattern"])
        unfit = "pattern" if pattern is None else None
        patterns += [] if pattern is None else [pattern]
    if "format" in schema:
        pattern = _FORMATS.get(schema["format"])
        unfit = "format" if pattern is None else unfit
        patterns += [] if pattern is None else [pattern]
    longest = int(schema["maxLength"]) if "maxLength" in schema else None
    return Words(None, int(schema.get("minLength", 0)), longest, tuple(patterns)), unfit


def _is_json(text: str) -> bool:
    """Return whether the parser might take a text for another value than a string."""
    return literal_of(text) is not None


def _whole(pattern: str) -> str | None:
    """Return a regular expression that matches the whole of each string in which `pattern` matches somewhere.

    Returns None for anchors elsewhere than at the ends, as in "^a|b$".
    """
    from llguidance import regex_to_lark

    starts, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    body = pattern[starts : len(pattern) - ends]
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", body)  # without escapes and classes
    outside = plain
    while "(" in outside and (shorter := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = shorter
    if "^" in plain or "$" in plain or ((starts or ends) and "|" in outside):
        return None
    whole = ("" if starts else "(?s:.*)") + f"({body})" + ("" if ends else "(?s:.*)")
    converted: str = regex_to_lark(whole, use_ascii="dw")
    return converted


def _text(schema: Mapping[str, Any]) -> str:
    """Return the JSON text of a schema with llguidance's options."""
    return json.dumps({**schema, "x-guidance": json_schema.OPTIONS}, ensure_ascii=False)
