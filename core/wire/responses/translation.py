"""Translate the items of a Responses request to a conversation.

Reasoning, an assistant's message and function calls in a row are one turn of the assistant: templates have no other
form for several calls.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import Any

from core.conversation import Conversation, ReasoningOptions
from core.errors import InvalidRequest
from core.wire.fields import sampling
from core.wire.responses.request import CALLS, RESULTS, InputItem, ResponsesRequest, call_arguments, text_of
from core.wire.responses.tools import declared, qualified, tool_choice

_ENCODED = "slm1."  # in front of reasoning that this server has encoded


def conversation(request: ResponsesRequest, items: Sequence[InputItem]) -> Conversation:
    """Translate the request. `items` are the stored conversation and the input, without references."""
    tools = declared(request.tools or ())
    reasoning = request.reasoning
    effort = reasoning.effort if reasoning else None
    enabled = request.enable_thinking
    if enabled is None and effort is not None:
        enabled = effort != "none"
    return Conversation(
        tools_field="tools[{}].parameters",
        messages=template_messages(request.instructions, items),
        tools=tuple(each.tool for each in tools),
        tool_choice=tool_choice(request.tool_choice, tools),
        parallel=request.parallel_tool_calls is not False,
        schema=request.schema,
        schema_field="text.format.schema",
        reasoning=ReasoningOptions(enabled, effort, None, request.chat_template_kwargs or {}),
        sampling=sampling(request),
        max_tokens=request.max_output_tokens,
        top_logprobs=(request.top_logprobs or 0) if request.includes("message.output_text.logprobs") else None,
        truncate=request.truncation == "auto",
    )


def template_messages(instructions: str | None, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return the items as chat templates expect messages."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    messages += _join_turns(_messages(items))
    return _with_user(_with_one_system(messages))


def _messages(items: Sequence[InputItem]) -> Iterator[dict[str, Any]]:
    """Yield one message for each item. Raises InvalidRequest for a result without its call."""
    calls: set[str] = set()
    for item in items:
        if item.kind == "message":
            yield {"role": item.role, "content": text_of(item.content)}
        elif item.kind == "reasoning":
            yield {"role": "assistant", "content": "", "reasoning_content": reasoning_text(item)}
        elif item.kind in CALLS:
            assert item.call_id is not None
            assert item.name is not None
            calls.add(item.call_id)
            name = item.name if item.namespace is None else qualified(item.namespace, item.name)
            function = {"name": name, "arguments": call_arguments(item)}
            call = {"id": item.call_id, "type": "function", "function": function}
            yield {"role": "assistant", "content": "", "tool_calls": [call]}
        elif item.kind in RESULTS:
            if item.call_id not in calls:
                raise InvalidRequest(
                    f"No tool call found for the output with call_id {str(item.call_id)[:80]!r}: send the "
                    "'function_call' item of that id before it.",
                    param="input",
                )
            yield {"role": "tool", "content": text_of(item.output), "tool_call_id": item.call_id}


def _join_turns(messages: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the assistant's messages in a row. A turn of nothing but reasoning is left out."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "assistant" or not joined or joined[-1]["role"] != "assistant":
            joined.append(message)
            continue
        turn = joined[-1]
        for key in ("content", "reasoning_content"):
            if text := "\n".join(filter(None, (turn.get(key), message.get(key)))):
                turn[key] = text
        if calls := [*turn.get("tool_calls", ()), *message.get("tool_calls", ())]:
            turn["tool_calls"] = calls
    return [each for each in joined if each["role"] != "assistant" or each["content"] or each.get("tool_calls")]


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the leading system and developer messages: many templates accept one system message only."""
    end = 0
    while end < len(messages) and messages[end]["role"] in ("system", "developer"):
        end += 1
    if end < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:end] if message["content"])
    return [{"role": "system", "content": text}, *messages[end:]]


def _with_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add an empty user message if there is no message to answer: agents probe a server with an empty input."""
    if all(message["role"] in ("system", "developer") for message in messages):
        return [*messages, {"role": "user", "content": ""}]
    return messages


def reasoning_text(item: InputItem) -> str:
    """Return the reasoning of a replayed item: its content, or what `encoded` wrote."""
    if text := text_of(item.content):
        return text
    encrypted = item.encrypted_content or ""
    if not encrypted.startswith(_ENCODED):
        return text_of(item.summary)
    try:
        return base64.b64decode(encrypted.removeprefix(_ENCODED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def encoded(reasoning: str) -> str:
    """Return reasoning for `encrypted_content`. It hides nothing. `reasoning_text` reads it when it is replayed."""
    return _ENCODED + base64.b64encode(reasoning.encode()).decode()
