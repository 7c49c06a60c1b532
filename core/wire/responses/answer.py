"""The response: its items, its usage, and the request's fields in it. Every key is always written."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from core.conversation import Conversation
from core.engine.interface import Cause
from core.wire.fields import Token
from core.wire.responses.request import ResponsesRequest
from core.wire.responses.tools import CustomTool, FunctionTool, NamespaceTool, effective

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str
    logprobs: list[Token] = []
    annotations: list[Any] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningItem(Struct, tag_field="type", tag="reasoning"):
    """`encrypted_content` is the encoded reasoning, if the request's `include` has it."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    encrypted_content: str | None = None
    summary: list[Any] = []


class FunctionCall(Struct, tag_field="type", tag="function_call"):
    """`arguments` is the JSON text of an object."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


class CustomToolCall(Struct, tag_field="type", tag="custom_tool_call"):
    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


OutputItem = OutputMessage | ReasoningItem | FunctionCall | CustomToolCall


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    """`finish_cause` extends OpenAI's shape: what cut the answer."""

    reason: Literal["max_output_tokens"]
    finish_cause: Cause | None


class ResponseError(Struct):
    code: str
    message: str


class EffectiveFormat(Struct):
    """A format with a schema has the other fields as well."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET


class EffectiveText(Struct):
    format: EffectiveFormat
    verbosity: str


class EffectiveReasoning(Struct):
    effort: str | None
    summary: None = None


class Response(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    incomplete_details: IncompleteDetails | None = None
    error: ResponseError | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    previous_response_id: str | None
    instructions: str | None
    tools: list[FunctionTool | CustomTool | NamespaceTool]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    truncation: Literal["auto", "disabled"]
    text: EffectiveText
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    reasoning: EffectiveReasoning
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


def in_progress(
    request: ResponsesRequest, conversation: Conversation, *, identity: str, created: int, model: str, store: bool
) -> Response:
    """Return the response before its first item, with the values that are in effect."""
    sampling = conversation.sampling
    return Response(
        id=identity,
        created_at=created,
        status="in_progress",
        model=model,
        output=[],
        previous_response_id=request.previous_response_id,
        instructions=request.instructions,
        tools=effective(request.tools or ()),
        tool_choice=_choice(request),
        parallel_tool_calls=conversation.parallel,
        truncation=request.truncation or "disabled",
        text=_text(request),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        top_logprobs=request.top_logprobs or 0,
        reasoning=EffectiveReasoning(request.reasoning.effort if request.reasoning else None),
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        store=store,
        metadata=request.metadata or {},
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )


def _choice(request: ResponsesRequest) -> str | dict[str, Any]:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    named: dict[str, Any] = msgspec.to_builtins(choice)
    named = {key: value for key, value in named.items() if value is not None}
    if "tools" in named:
        named["tools"] = [{key: value for key, value in each.items() if value is not None} for each in named["tools"]]
    return named


def _text(request: ResponsesRequest) -> EffectiveText:
    form = request.text.format if request.text else None
    verbosity = (request.text.verbosity if request.text else None) or "medium"
    if form is None or form.type != "json_schema":
        return EffectiveText(EffectiveFormat("text" if form is None else form.type), verbosity)
    assert form.schema is not None
    name, strict = form.name or "response", form.strict is not False
    return EffectiveText(EffectiveFormat(form.type, name, form.description, form.schema, strict), verbosity)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int) -> ResponseUsage:
    return ResponseUsage(
        prompt_tokens,
        InputTokensDetails(cached_tokens),
        completion_tokens,
        OutputTokensDetails(reasoning_tokens),
        prompt_tokens + completion_tokens,
    )


class Deleted(Struct):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(Struct):
    """A page of a stored response's input."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"
