"""OpenAI's chat completions: the request and its translation for the engine, chunks, and the completion.

The request has OpenAI's fields for text models and top_k, min_p and repeat_penalty. Unlisted fields (`user`,
`metadata`, `store`, `service_tier`, ...) are accepted and have no effect. Unsupported fields that would change the
answer are rejected (`core.wire.fields.UnsupportedFields`). An explicit null means the same as an absent field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from core.conversation import Conversation
from core.engine.interface import Cause, FinishReason, TokenLogprob
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
    Usage,
    check_unsupported,
    nested_beyond,
    sampling,
)

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(Struct):
    """A content part. Only `text` and an assistant's `refusal` are supported."""

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
            raise InvalidRequest("'modalities' may only contain 'text': this model has no audio.", param="modalities")
        check_unsupported(self)
        self._check_tools()
        for index, message in enumerate(self.messages):
            _check(message, f"messages[{index}]")

    def _check_tools(self) -> None:
        for field, value in (("tools", self.tools), ("functions", self.functions)):
            if value:
                raise InvalidRequest(
                    f"'{field}' is not supported yet; leave it out, or use 'response_format' to get JSON.",
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
            f"'{where}' is of type '{part.type}': this model only reads text; send parts of type 'text'.",
            param=f"{where}.type",
        )
    else:
        raise InvalidRequest(f"'{where}.type' must be 'text', got {part.type[:40]!r}.", param=f"{where}.type")


def text_of(message: Message) -> str:
    """Return the text of a message. Parts are joined by line breaks, as in llama-server; null is an empty string."""
    content = message.content
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join((part.text if part.type == "text" else part.refusal) or "" for part in content)
    return message.refusal or ""


def conversation(request: ChatRequest) -> Conversation:
    """Translate the request."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Conversation(
        messages=template_messages(request.messages),
        schema=None if request.response_format is None else request.response_format.answer_schema,
        sampling=sampling(request),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        n=request.n or 1,
        stop=tuple(stop),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates expect them: content as one string, tool-call arguments as objects."""
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    calls = _calls(message)
    if calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function)},
            }
            for call in calls
        ]
    return fields


def _calls(message: Message) -> list[ToolCall]:
    return message.tool_calls or ([ToolCall(message.function_call)] if message.function_call else [])


def _object(call: FunctionCall) -> Any:
    """Return tool-call arguments as an object, as transformers passes them to templates. OpenAI sends JSON text."""
    arguments = call.arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        return arguments  # a model may have produced invalid JSON in an earlier turn


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class Token(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(Struct):
    content: list[Token]
    refusal: None = None


class AssistantMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()


class Choice(Struct):
    """`finish_cause` extends OpenAI's shape: what cut the answer. It is absent unless `finish_reason` is "length"."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None
    finish_cause: Cause | UnsetType = UNSET


class Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class ChunkDelta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Struct):
    """`finish_cause` extends OpenAI's shape; see `Choice`."""

    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    finish_cause: Cause | UnsetType = UNSET


class Chunk(Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ChunkHead(NamedTuple):
    """The fields that all chunks of one completion share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def chunk(self, choice: ChunkChoice | None, usage: Usage | UnsetType | None) -> Chunk:
        return Chunk(*self, () if choice is None else (choice,), usage)


def fold(chunks: list[Chunk], *, logprobs: bool) -> Completion:
    """Fold the chunks of a finished stream into a completion. The last chunk must have the usage.

    Every choice starts with a chunk that has its role and ends with one that has its finish reason.
    """
    choices: dict[int, Choice] = {}
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            # 1) The first chunk of a choice creates it.
            choice = choices.get(part.index)
            if choice is None:
                choice = choices[part.index] = Choice(part.index, AssistantMessage(""), "stop")
                choice.logprobs = Logprobs([]) if logprobs else None
                texts[part.index] = []
            # 2) Text and logprobs accumulate.
            if part.delta.content is not UNSET:
                texts[part.index].append(part.delta.content)
            if part.logprobs is not None and choice.logprobs is not None:
                choice.logprobs.content.extend(part.logprobs.content)
            # 3) The last chunk of a choice says why it ended.
            if part.finish_reason is not None:
                choice.finish_reason, choice.finish_cause = part.finish_reason, part.finish_cause
    for index, pieces in texts.items():
        choices[index].message.content = "".join(pieces)
    last = chunks[-1]
    assert isinstance(last.usage, Usage)
    ordered = [choices[index] for index in sorted(choices)]
    return Completion(last.id, last.created, last.model, ordered, last.usage, last.system_fingerprint)


def logprobs(tokens: Iterable[TokenLogprob]) -> Logprobs:
    """Return logprobs in OpenAI's shape. `token` shows an incomplete character as U+FFFD; `bytes` is exact."""
    return Logprobs(
        [
            Token(
                token.token.decode(errors="replace"),
                token.logprob,
                list(token.token),
                [TopLogprob(text.decode(errors="replace"), logprob, list(text)) for text, logprob in token.top],
            )
            for token in tokens
        ]
    )
