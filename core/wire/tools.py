"""Check the tools and the tool choice of a request, which all protocols share. Each protocol has structs of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from core.conversation import Tool, ToolChoice
from core.errors import InvalidRequest
from core.wire.fields import nested_beyond

MAX_TOOLS = 128
MAX_DEPTH = 64  # nested arrays and objects in a call's arguments

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None, where: str
) -> Tool:
    """Return the tool of a request. `where` is its place in the body. Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{where}.name' must have 1 to 64 letters, digits, '_' or '-', got {name[:80]!r}.", param=f"{where}.name"
        )
    if parameters is None:
        parameters = NO_PARAMETERS
    elif parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f"The schema of tool {name!r} must be of type 'object', got {str(parameters['type'])[:40]!r}.",
            param=f"{where}.parameters",
        )
    return Tool(name, description, parameters, bool(strict))


def check_tools(tools: Sequence[Tool], field: str) -> None:
    """Raise InvalidRequest if there are too many tools, or two of one name."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"'{field}' may have at most {MAX_TOOLS} tools, got {len(tools)}.", param=field)
    names: set[str] = set()
    for each in tools:
        if each.name in names:
            raise InvalidRequest(f"'{field}' has two tools with the name {each.name!r}.", param=field)
        names.add(each.name)


def check_choice(choice: ToolChoice, tools: Sequence[Tool], field: str = "tool_choice") -> None:
    """Raise InvalidRequest if the choice demands a call without tools, or names a tool that is not there."""
    if choice.mode == "required" and not tools:
        raise InvalidRequest(
            f"'{field}' demands a tool call, but the request has no tools: add some, or use 'none' or 'auto'.",
            param=field,
        )
    names = [each.name for each in tools]
    for name in choice.names or ():
        if name not in names:
            allowed = ", ".join(repr(each) for each in names[:20]) or "none"
            raise InvalidRequest(f"'{field}' names the tool {name[:80]!r}; the request has: {allowed}.", param=field)


def arguments_object(arguments: str) -> Any:
    """Return the JSON text of a call's arguments as an object, as templates expect it.

    A model may have produced invalid JSON in an earlier turn. That stays text.
    """
    try:
        return msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        return arguments


def check_arguments(arguments: Any, place: str) -> None:
    """Raise InvalidRequest if a value is nested too deeply for a template."""
    if nested_beyond(arguments, MAX_DEPTH):
        raise InvalidRequest(f"'{place}' may be nested at most {MAX_DEPTH} deep.", param=place)
