"""The request of POST /v1/responses. Replayed items may lack fields that a response has.

Fields that are not listed here (`service_tier`, `stream_options`, `prompt_cache_retention`, ...) have no effect. An
explicit null means the same as an absent field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from core.errors import InvalidRequest
from core.wire.fields import (
    Bias,
    Effort,
    MaxTokens,
    Penalty,
    Probability,
    RepeatPenalty,
    Seed,
    Temperature,
    TopK,
    TopLogprobs,
    UnsupportedFields,
    check_unsupported,
)
from core.wire.responses.tools import ToolChoiceSpec, ToolSpec, declared, tool_choice
from core.wire.tools import arguments_object, check_arguments

INPUT_IMAGE = ("input_image", "input_file", "input_audio", "input_video", "computer_screenshot")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")

# Items whose text the model reads. Items of hosted tools ("web_search_call", "mcp_list_tools", ...) are left out.
CALLS = ("function_call", "custom_tool_call")
RESULTS = ("function_call_output", "custom_tool_call_output")


Refused = Annotated[Any, Meta(description="Not supported.", extra_json_schema={"enum": [None]})]


class Part(Struct):
    """A content part. Only texts and a refusal are supported."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct, kw_only=True):
    """An item of the input. Which fields it has depends on its type; without a type it is a message."""

    type: str | None = None
    role: Literal["user", "system", "developer", "assistant"] | None = None
    content: str | list[Part] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | dict[str, Any] | None = None
    input: str | None = None
    output: str | list[Part] | dict[str, Any] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None

    @property
    def kind(self) -> str:
        """The type; "" for an item of a hosted tool, which the model does not see."""
        if self.type is None:
            return "message" if self.role is not None else "item_reference"
        known = ("message", "reasoning", "item_reference", *CALLS, *RESULTS)
        return self.type if self.type in known else ""


class TextFormat(Struct):
    """The form of the answer. A schema is always enforced, with or without `strict`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """`verbosity` has no effect."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningRequest(Struct):
    """`summary` has no effect: the answer has the reasoning itself."""

    effort: Effort | None = None
    summary: str | None = None


class ResponsesRequest(UnsupportedFields, kw_only=True):
    input: str | list[InputItem] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: MaxTokens | None = None
    max_tool_calls: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    logit_bias: dict[str, Bias] | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceSpec | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningRequest | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    conversation: Refused = None
    prompt: Refused = None
    messages: Refused = None
    response_format: Refused = None
    reasoning_effort: Refused = None
    stop: Refused = None
    n: Refused = None
    max_tokens: Refused = None
    max_completion_tokens: Refused = None

    def __post_init__(self) -> None:
        _check_fields(self)
        check_unsupported(self, supported=("reasoning", "max_output_tokens"))
        for index, item in enumerate(self.items):
            _check(item, f"input[{index}]")
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema" and form.schema is None:
            raise InvalidRequest(
                "'text.format.schema' is missing; with type 'json_schema' it must be a JSON Schema.",
                param="text.format.schema",
            )
        if self.chat_template_kwargs:
            check_arguments(self.chat_template_kwargs, "chat_template_kwargs")
        tool_choice(self.tool_choice, declared(self.tools or ()))

    @property
    def items(self) -> list[InputItem]:
        """The input as items."""
        if isinstance(self.input, str):
            return [InputItem(type="message", role="user", content=self.input)]
        return self.input or []

    @property
    def schema(self) -> dict[str, Any] | None:
        """The schema that the answer must match; None for plain text."""
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return form.schema if form.type == "json_schema" else {"type": "object"}

    def includes(self, name: str) -> bool:
        return name in (self.include or ())


_USE_INSTEAD: Mapping[str, str] = {
    "conversation": "send the whole conversation in 'input'",
    "prompt": "send 'instructions' and 'input'",
    "messages": "use 'input'",
    "response_format": "use 'text.format'",
    "reasoning_effort": "use 'reasoning.effort'",
    "stop": "leave it out",
    "n": "send the request several times",
    "max_tokens": "use 'max_output_tokens'",
    "max_completion_tokens": "use 'max_output_tokens'",
}


def _check_fields(request: ResponsesRequest) -> None:
    for name, instead in _USE_INSTEAD.items():
        value = getattr(request, name)
        if value is not None:
            raise InvalidRequest(f"'{name}' is not a field of this route; {instead}.", param=name)
    if request.background:
        raise InvalidRequest(
            "'background' is not supported: responses are not made after the request has ended. Use 'stream'.",
            param="background",
        )
    if request.input is None and request.previous_response_id is None:
        raise InvalidRequest("'input' is missing; it must be a string or an array of items.", param="input")


def _check(item: InputItem, where: str) -> None:
    required: Mapping[str, tuple[str, ...]] = {
        "message": ("role",),
        "item_reference": ("id",),
        "function_call": ("call_id", "name"),
        "custom_tool_call": ("call_id", "name"),
        "function_call_output": ("call_id",),
        "custom_tool_call_output": ("call_id",),
    }
    # 1) The type, and the fields that it needs.
    if item.type is None and item.role is None and item.id is None:
        raise InvalidRequest(
            f"'{where}' has neither 'type' nor 'role'; a message needs a role, other items need a type.",
            param=f"{where}.type",
        )
    if item.kind == "":
        if not _is_hosted(item.type or ""):
            allowed = "'message', 'function_call', 'function_call_output', 'reasoning', 'item_reference', "
            raise InvalidRequest(
                f"'{where}.type' must be one of {allowed}'custom_tool_call' or 'custom_tool_call_output', "
                f"got {(item.type or '')[:40]!r}.",
                param=f"{where}.type",
            )
        return
    for field in required.get(item.kind, ()):
        if getattr(item, field) is None:
            raise InvalidRequest(f"'{where}.{field}' is missing; it must be a string.", param=f"{where}.{field}")
    # 2) The parts.
    for field in ("content", "output", "summary"):
        parts = getattr(item, field)
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            _check_part(part, f"{where}.{field}[{index}]")
    # 3) The call and its result.
    if item.kind in CALLS:
        check_arguments(call_arguments(item), f"{where}.arguments")
    if item.kind in RESULTS and not isinstance(item.output, str | list):
        raise InvalidRequest(
            f"'{where}.output' must be a string or an array of parts of type 'input_text'.", param=f"{where}.output"
        )


def _is_hosted(kind: str) -> bool:
    """Return whether items of this type come from tools that run on OpenAI's servers or in the client's shell."""
    return kind.endswith(("_call", "_call_output")) or kind.startswith(("mcp_", "tool_search"))


def _check_part(part: Part, where: str) -> None:
    if part.type in TEXT_PARTS or part.type == "refusal":
        field = "refusal" if part.type == "refusal" else "text"
        if getattr(part, field) is None:
            raise InvalidRequest(f"'{where}.{field}' is missing; it must be a string.", param=f"{where}.{field}")
    elif part.type in INPUT_IMAGE:
        raise InvalidRequest(
            f"'{where}' is of type '{part.type}': this model only reads text; send parts of type 'input_text'.",
            param=f"{where}.type",
        )
    else:
        raise InvalidRequest(
            f"'{where}.type' must be 'input_text' or 'output_text', got {(part.type or '')[:40]!r}.",
            param=f"{where}.type",
        )


def call_arguments(item: InputItem) -> Any:
    """Return the arguments of a replayed call as an object, as templates expect it. Invalid JSON stays text."""
    if item.kind == "custom_tool_call":
        return {"input": item.input or ""}
    return arguments_object(item.arguments) if isinstance(item.arguments, str) else item.arguments or {}


def text_of(content: str | list[Part] | dict[str, Any] | None) -> str:
    """Return the text of a string or of parts. Parts are joined by line breaks, as in chat."""
    if isinstance(content, str):
        return content
    return "\n".join(_texts(content)) if isinstance(content, list) else ""


def _texts(parts: list[Part]) -> Iterator[str]:
    for part in parts:
        yield (part.refusal if part.type == "refusal" else part.text) or ""


def input_item(item: InputItem, new_id: Callable[[str], str]) -> dict[str, Any]:
    """Return an item as a stored conversation has it: with an id, and a message's content as parts."""
    fields = {key: value for key, value in msgspec.to_builtins(item).items() if value is not None}
    fields["type"] = item.type or item.kind
    prefix = {"message": "msg", "reasoning": "rs", "custom_tool_call": "ctc", "custom_tool_call_output": "ctco"}
    fields.setdefault("id", new_id(prefix.get(item.kind, "fco" if item.kind in RESULTS else "fc")))
    fields.setdefault("status", "completed")
    if item.kind == "message":
        kind = "output_text" if item.role == "assistant" else "input_text"
        parts = item.content if isinstance(item.content, list) else [Part(kind, item.content or "")]
        fields["content"] = [_stored_part(part) for part in parts]
    return fields


def _stored_part(part: Part) -> dict[str, Any]:
    fields: dict[str, Any] = {key: value for key, value in msgspec.to_builtins(part).items() if value is not None}
    return fields | ({"annotations": []} if part.type == "output_text" else {})
