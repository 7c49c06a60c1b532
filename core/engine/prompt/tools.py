"""Show tools, calls and results to a model: as its chat template does, or as text in the form of its family.

Everything here works on messages whose strings have been marked (`core.engine.prompt.guard`), so the markers that this
module writes become tokens, and those in a client's text do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from core.engine.output.families import Family
from core.engine.prompt.capabilities import Capabilities

Message = dict[str, Any]

_RESULT = "<tool_response>\n{}\n</tool_response>"


def adapt(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], capabilities: Capabilities, family: Family
) -> tuple[list[Message], dict[str, Any]]:
    """Return messages that the template can show, and the variables with which it lists the tools.

    `tools` are in OpenAI's shape. What the template cannot show becomes text.
    """
    adapted = _named([dict(message) for message in messages])
    # 1) Ids of the length that the family has.
    if family.id_length is not None:
        adapted = [_with_short_ids(message, family.id_length) for message in adapted]
    # 2) Calls and results.
    if not capabilities.calls:
        adapted = [_with_calls_as_text(message, family) for message in adapted]
    else:
        if not capabilities.several:
            adapted = _one_call_a_turn(adapted)
        adapted = [_with_arguments(message, capabilities) for message in adapted]
    if not capabilities.results:
        adapted = _with_results_as_text(adapted)
    # 3) Tools.
    if not tools:
        return adapted, {}
    if capabilities.tools is not None:
        return adapted, {capabilities.tools: list(tools)}
    return _with_system(adapted, instructions(tools, family)), {}


def instructions(tools: Sequence[Mapping[str, Any]], family: Family) -> str:
    """Return a system text that lists the tools and shows how to call one."""
    lines = "\n".join(_json(tool["function"]) for tool in tools)
    example = calls_text([("function_name", {"parameter": "value"})], family)
    return (
        f"# Tools\n\nYou may call functions. One JSON object a line describes each:\n<tools>\n{lines}\n</tools>\n\n"
        f"To call a function, write:\n{example}\n\n"
        "Its result follows in the next message. If no function is needed, answer in plain text."
    )


def calls_text(calls: Iterable[tuple[str, Any]], family: Family) -> str:
    """Return calls as the family's model writes them."""
    bodies = [_body(name, arguments, family) for name, arguments in calls]
    if family.form in ("array", "python"):
        return f"{family.opener}[{', '.join(bodies)}]{family.closer}"
    enclosed = family.separator.join(f"{family.opener}{body}{family.closer}" for body in bodies)
    return f"{family.section}{enclosed}{family.section_closer}"


def _body(name: str, arguments: Any, family: Family) -> str:
    members = arguments if isinstance(arguments, dict) else {}
    if family.form in ("object", "array"):
        return f'{{"{family.name_key}": {_json(name)}, "{family.arguments_key}": {_json(arguments)}}}'
    if family.form == "named":
        return f"{name}{family.middle}{_json(arguments)}"
    if family.form == "tagged":
        lines = [
            f"<parameter={key}>\n{value if isinstance(value, str) else _json(value)}\n</parameter>\n"
            for key, value in members.items()
        ]
        return f"<function={name}>\n{''.join(lines)}</function>"
    if family.form == "python":
        return f"{name}({', '.join(f'{key}={_json(value)}' for key, value in members.items())})"
    return f"{name}{_braces(members, family.quote)}"


def _braces(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0].lower())
        return "{" + ",".join(f"{key}:{_braces(inner, quote)}" for key, inner in ordered) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_braces(inner, quote) for inner in value) + "]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(message: Message) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]


def _named(messages: list[Message]) -> list[Message]:
    """Give each result the name of the function that was called: some templates show it."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call.get("id") or ""] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message:
            name = names.get(message.get("tool_call_id") or "")
            if name is not None:
                message["name"] = name
    return messages


def _with_short_ids(message: Message, length: int) -> Message:
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = _short(message["tool_call_id"], length)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short(call.get("id") or "", length)} for call in message["tool_calls"]]
    return changed


def _short(call_id: str, length: int) -> str:
    """Return an id of letters and digits of this length: the same one for the same id."""
    if re.fullmatch(f"[a-zA-Z0-9]{{{length}}}", call_id):
        return call_id
    return sha256(call_id.encode()).hexdigest()[:length]


def _with_calls_as_text(message: Message, family: Family) -> Message:
    if not message.get("tool_calls"):
        return message
    changed = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = calls_text(_calls(message), family)
    changed["content"] = f"{message['content']}\n{calls}" if message["content"] else calls
    return changed


def _with_arguments(message: Message, capabilities: Capabilities) -> Message:
    """Give arguments the type that the template takes, and an empty content next to calls its value."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if capabilities.arguments == "string":
            arguments = arguments if isinstance(arguments, str) else _json(arguments)
        elif not isinstance(arguments, dict):  # a model's invalid JSON
            arguments = {"arguments": arguments}
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls, "content": message["content"] or capabilities.empty}


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Split a message with several calls, each followed by its result."""
    split: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            split.append(message)
            continue
        results: list[Message] = []
        while position < len(messages) and messages[position]["role"] == "tool":
            results.append(messages[position])
            position += 1
        for index, call in enumerate(calls):
            split.append({**message, "tool_calls": [call], "content": "" if index else message["content"]})
            own = [result for result in results if result.get("tool_call_id") == call.get("id")]
            split += own
            results = [result for result in results if result not in own]
        split += results
    return split


def _with_results_as_text(messages: list[Message]) -> list[Message]:
    """Put results into user messages. Results in a row, and a user's message after them, are one message."""
    changed: list[Message] = []
    follows = False  # whether the last message holds results
    for message in messages:
        is_result = message["role"] == "tool"
        content = _RESULT.format(message["content"]) if is_result else message["content"]
        if follows and (is_result or message["role"] == "user"):
            separator = "\n" if is_result else "\n\n"
            changed[-1] = {**changed[-1], "content": f"{changed[-1]['content']}{separator}{content}"}
        else:
            changed.append({"role": "user", "content": content} if is_result else message)
        follows = is_result
    return changed


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """Add a text to the leading system message, or put one in front."""
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        content = f"{first['content']}\n\n{text}" if first["content"] else text
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
