"""The chat completion request: OpenAI's fields as far as a text model goes, and top_k, min_p, repeat_penalty.

Fields that are not named here (`user`, `metadata`, `store`, `service_tier`, ...) are accepted and have no effect. Those
that would change the answer and are not supported are refused (`core.wire.fields`). An explicit null is the same
as an absent field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from core.engine.interface import FinishReason, TokenLogprob
from core.errors import InvalidRequest
from core.wire.fields import (
    Bias,
    Choices,
    MaxTokens,
    Penalty,
    Probability,
    RepeatPenalty,
    ResponseFormat,
    Seed,
    StopString,
    StopStrings,
    StreamOptions,
    Temperature,
    TopK,
    TopLogprobs,
    UnsupportedFields,
    check_unsupported,
    nested_beyond,
)

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(Struct):
    """A piece of content. Only `text` and an assistant's `refusal` can be read here."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Struct):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class Message(Struct):
    role: Role
    content: str | list[Part] | UnsetType | None = UNSET
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None


class ChatRequest(UnsupportedFields, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    n: Choices | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        if self.modalities and "audio" in self.modalities:
            raise InvalidRequest("'modalities' may only hold 'text': this model makes no audio.", param="modalities")
        check_unsupported(self)
        self._check_tools()
        for index, message in enumerate(self.messages):
            _check(message, f"messages[{index}]")

    def _check_tools(self) -> None:
        for field, given in (("tools", self.tools), ("functions", self.functions)):
            if given:
                raise InvalidRequest(
                    f"'{field}' is not supported yet; leave it out, or ask for JSON with 'response_format'.",
                    param=field,
                )
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("'tool_choice' without 'tools' may only be 'none' or 'auto'.", param="tool_choice")
        if self.function_call not in (None, "none", "auto"):
            raise InvalidRequest(
                "'function_call' without 'functions' may only be 'none' or 'auto'.", param="function_call"
            )


def _check(message: Message, where: str) -> None:
    content = message.content
    if content is UNSET and message.role != "assistant":
        raise InvalidRequest(
            f"'{where}.content' is missing; it must be a string or an array of parts.", param=f"{where}.content"
        )
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]")
    for index, call in enumerate(_calls(message)):
        if nested_beyond(_object(call.function), 64):
            place = f"{where}.tool_calls[{index}].function.arguments"
            raise InvalidRequest(f"'{place}' may be nested at most 64 deep.", param=place)


def _check_part(part: Part, where: str) -> None:
    if part.type in ("text", "refusal"):
        if getattr(part, part.type) is None:
            raise InvalidRequest(
                f"'{where}.{part.type}' is missing; it must be a string.", param=f"{where}.{part.type}"
            )
    elif part.type in ("image_url", "input_audio", "file", "video_url"):
        raise InvalidRequest(
            f"'{where}' is of type '{part.type}': this model reads text only; send parts of type 'text'.",
            param=f"{where}.type",
        )
    else:
        raise InvalidRequest(f"'{where}.type' must be 'text', got {part.type[:40]!r}.", param=f"{where}.type")


def text_of(message: Message) -> str:
    """The message's words: parts joined by line breaks (as llama-server does), null as nothing."""
    content = message.content
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join((part.text if part.type == "text" else part.refusal) or "" for part in content)
    return message.refusal or ""


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: content one string, tool calls' arguments objects."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> dict[str, Any]:
    given: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.name is not None:
        given["name"] = message.name
    if message.tool_call_id is not None:
        given["tool_call_id"] = message.tool_call_id
    calls = _calls(message)
    if calls:
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function)},
            }
            for call in calls
        ]
    return given


def _calls(message: Message) -> list[ToolCall]:
    return message.tool_calls or ([ToolCall(message.function_call)] if message.function_call else [])


def _object(call: FunctionCall) -> Any:
    """OpenAI sends arguments as JSON text, templates (as transformers feeds them) want the object."""
    arguments = call.arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        return arguments  # what a model once said need not be JSON


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int  # of all choices
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Likely(Struct):
    token: str
    logprob: float
    bytes: list[int]


class Token(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Likely]


class Logprobs(Struct):
    content: list[Token]
    refusal: None = None


class AssistantMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()


class Choice(Struct):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached_tokens)
    )


def logprobs(tokens: Iterable[TokenLogprob]) -> Logprobs:
    """OpenAI's shape. `token` shows half a character as U+FFFD; `bytes` has it exactly."""
    return Logprobs(
        [
            Token(
                token.token.decode(errors="replace"),
                token.logprob,
                list(token.token),
                [Likely(text.decode(errors="replace"), logprob, list(text)) for text, logprob in token.top],
            )
            for token in tokens
        ]
    )
