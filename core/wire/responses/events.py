"""The events of a stream. Each is named by its `type`; their `sequence_number` rises by one from 0."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from core.wire.fields import Token
from core.wire.responses.answer import OutputItem, OutputText, ReasoningText, Response


class ResponseEvent(Struct):
    """The response as it begins, or as it is at its end."""

    response: Response
    sequence_number: int
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]


class ItemEvent(Struct):
    """An item begins, or is complete."""

    output_index: int
    item: OutputItem
    sequence_number: int
    type: Literal["response.output_item.added", "response.output_item.done"]


class PartEvent(Struct):
    """A part of an item's content begins, or is complete."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText
    sequence_number: int
    type: Literal["response.content_part.added", "response.content_part.done"]


class TextDelta(Struct):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[Token]
    sequence_number: int
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextDone(Struct):
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[Token]
    sequence_number: int
    type: Literal["response.output_text.done"] = "response.output_text.done"


class ReasoningDelta(Struct):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    sequence_number: int
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"


class ReasoningDone(Struct):
    item_id: str
    output_index: int
    content_index: int
    text: str
    sequence_number: int
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"


class CallDelta(Struct):
    """The next part of a call's arguments, or the input of a custom tool."""

    item_id: str
    output_index: int
    delta: str
    sequence_number: int
    type: Literal["response.function_call_arguments.delta", "response.custom_tool_call_input.delta"]


class ArgumentsDone(Struct):
    item_id: str
    output_index: int
    name: str
    arguments: str
    sequence_number: int
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"


class CustomInputDone(Struct):
    item_id: str
    output_index: int
    input: str
    sequence_number: int
    type: Literal["response.custom_tool_call_input.done"] = "response.custom_tool_call_input.done"


class ErrorBody(Struct):
    type: str
    code: str
    message: str
    param: str | None


class ErrorEvent(Struct):
    """An error after the status was sent: flat as OpenAI writes it, and in `error` as Open Responses wants it."""

    code: str
    message: str
    param: str | None
    error: ErrorBody
    sequence_number: int
    type: Literal["error"] = "error"


StreamEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | CallDelta
    | ArgumentsDone
    | CustomInputDone
    | ErrorEvent
)
