"""The tools of a Responses request: functions, custom tools and namespaces, and what the model sees of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from core.conversation import Tool, ToolChoice
from core.errors import InvalidRequest
from core.wire.tools import check_choice, check_tools, tool

MAX_NAME = 64

CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


class CustomFormat(Struct):
    """What the input of a custom tool looks like. The model reads a grammar, but nothing enforces it."""

    type: str = "text"
    syntax: str | None = None
    definition: str | None = None


class ToolSpec(Struct):
    """A tool: a function, a custom tool or a namespace of such tools.

    The model does not see tools of other types, which run on OpenAI's servers or in a shell.
    """

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: CustomFormat | None = None
    tools: list[ToolSpec] | None = None


class NamedTool(Struct):
    """One of the tools of an `allowed_tools` choice."""

    type: str = "function"
    name: str | None = None
    namespace: str | None = None


class ToolChoiceSpec(Struct):
    """A choice of one tool, or of some of the tools."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedTool] | None = None


class FunctionTool(Struct, tag_field="type", tag="function"):
    """A function in effect."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class CustomTool(Struct, tag_field="type", tag="custom"):
    """A custom tool in effect."""

    name: str
    description: str | None
    format: CustomFormat


class NamespaceTool(Struct, tag_field="type", tag="namespace"):
    """A namespace in effect."""

    name: str
    description: str
    tools: list[FunctionTool | CustomTool]


class Declared(NamedTuple):
    """A tool as the model sees it, and the client's names for it."""

    tool: Tool
    name: str
    namespace: str | None = None
    custom: bool = False


def declared(specs: Sequence[ToolSpec]) -> tuple[Declared, ...]:
    """Return the tools that the model sees. Raises InvalidRequest."""
    tools = tuple(_each_declared(specs, "tools", None))
    check_tools([each.tool for each in tools], "tools")
    return tools


def _each_declared(specs: Sequence[ToolSpec], where: str, namespace: str | None) -> Iterator[Declared]:
    for index, spec in enumerate(specs):
        place = f"{where}[{index}]"
        if spec.type not in ("function", "custom", "namespace"):
            continue
        if spec.name is None:
            raise InvalidRequest(f"'{place}.name' is missing; it must be a string.", param=f"{place}.name")
        if spec.type == "namespace":
            if namespace is not None:
                raise InvalidRequest(f"'{place}' is a namespace inside a namespace.", param=f"{place}.type")
            yield from _each_declared(spec.tools or (), f"{place}.tools", spec.name)
            continue
        custom = spec.type == "custom"
        parameters = CUSTOM_PARAMETERS if custom else spec.parameters
        strict = True if custom else spec.strict
        name = spec.name if namespace is None else qualified(namespace, spec.name)
        yield Declared(tool(name, _described(spec), parameters, strict, place), spec.name, namespace, custom)


def _described(spec: ToolSpec) -> str | None:
    """Return the description. The model reads the grammar of a custom tool's input in it."""
    grammar = spec.format.definition if spec.type == "custom" and spec.format else None
    if grammar is None or spec.format is None:
        return spec.description
    return f"{spec.description or ''}\nThe input follows this {spec.format.syntax or ''} grammar:\n{grammar}".strip()


def qualified(namespace: str, name: str) -> str:
    """Return the name of a namespace's tool for the model. A long one is cut and ends with a digest."""
    joined = re.sub(r"[^a-zA-Z0-9_-]", "_", f"{namespace.removesuffix('__')}__{name}")
    if len(joined) <= MAX_NAME:
        return joined
    return f"{joined[: MAX_NAME - 9]}_{sha256(joined.encode()).hexdigest()[:8]}"


def tool_choice(choice: str | ToolChoiceSpec | None, in_effect: Sequence[Declared]) -> ToolChoice:
    """Return the choice for the model. Raises InvalidRequest if it names a tool that is not in effect."""
    tools = [each.tool for each in in_effect]
    if not isinstance(choice, ToolChoiceSpec):
        mode: Any = choice or "auto"
        neutral = ToolChoice(mode)
    elif choice.type in ("function", "custom"):
        if choice.name is None:
            raise InvalidRequest("'tool_choice.name' is missing; it must name a tool.", param="tool_choice.name")
        neutral = ToolChoice("required", (_model_name(choice.name, choice.namespace, in_effect),))
    elif choice.type == "allowed_tools":
        if not choice.tools or choice.mode is None:
            raise InvalidRequest(
                "'tool_choice' of type 'allowed_tools' needs a 'mode', 'auto' or 'required', and at least one of "
                "'tools'.",
                param="tool_choice",
            )
        names = tuple(
            _model_name(each.name, each.namespace, in_effect)
            for each in choice.tools
            if each.name is not None and each.type in ("function", "custom")
        )
        neutral = ToolChoice(choice.mode, names) if names or choice.mode == "required" else ToolChoice("none")
        if not names and choice.mode == "required":
            raise InvalidRequest(
                "'tool_choice.tools' has no function: this server runs no tools of its own.", param="tool_choice.tools"
            )
    else:
        raise InvalidRequest(
            f"'tool_choice' names the tool {choice.type[:40]!r}, which this server does not have. It must be 'none', "
            "'auto', 'required', or an object of type 'function', 'custom' or 'allowed_tools'.",
            param="tool_choice",
        )
    check_choice(neutral, tools)
    return neutral


def _model_name(name: str, namespace: str | None, in_effect: Sequence[Declared]) -> str:
    """Return the name that the model sees: of the tool in that namespace, of that name, or of a qualified name."""
    for each in in_effect:
        if each.name == name and namespace in (None, each.namespace):
            return each.tool.name
    return name


def effective(specs: Sequence[ToolSpec]) -> list[FunctionTool | CustomTool | NamespaceTool]:
    """Return the tools in effect, in the shape of the response."""
    tools: list[FunctionTool | CustomTool | NamespaceTool] = []
    for spec in specs:
        if spec.type == "namespace":
            inner = [each for each in effective(spec.tools or ()) if not isinstance(each, NamespaceTool)]
            tools.append(NamespaceTool(spec.name or "", spec.description or "", inner))
        elif spec.type == "custom":
            tools.append(CustomTool(spec.name or "", spec.description, spec.format or CustomFormat()))
        elif spec.type == "function":
            strict = spec.strict is not False
            tools.append(FunctionTool(spec.name or "", spec.description, spec.parameters, strict))
    return tools


def custom_input(arguments: str) -> str:
    """Return the input of a custom tool from the JSON text of its arguments."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments
