"""OpenAI's chat completions: the request and its translation for the engine, chunks, and the completion.

The request has OpenAI's fields for text models and top_k, min_p and repeat_penalty. Unlisted fields (`user`,
`metadata`, `store`, `service_tier`, ...) are accepted and have no effect. Unsupported fields that would change the
answer are rejected (`core.wire.fields.UnsupportedFields`). An explicit null means the same as an absent field.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType

from core.conversation import Conversation, ReasoningOptions, Tool, ToolChoice
from core.engine.interface import Arguments, Call, Cause, Event, Reasoning, Text
from core.errors import InvalidRequest
from core.wire.fields import (
    Bias,
    Choices,
    Effort,
    Logprobs,
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
    sampling,
)
from core.wire.tools import arguments_object, check_arguments, check_choice, check_tools, tool

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
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name for it


class FunctionSpec(Struct):
    """What the model reads about a function. `parameters` is the JSON Schema of an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Struct):
    """A tool. Only functions are supported."""

    type: str
    function: FunctionSpec | None = None


class FunctionName(Struct):
    name: str


class NamedTool(Struct):
    """One of the tools in an `allowed_tools` choice."""

    type: str = "function"
    function: FunctionName | None = None


class AllowedTools(Struct):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoiceSpec(Struct):
    """A choice of one function, or of some of the tools."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


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
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceSpec | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionSpec] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        if self.modalities and "audio" in self.modalities:
            raise InvalidRequest("'modalities' may only contain 'text': this model has no audio.", param="modalities")
        check_unsupported(self)
        if self.tools and self.functions:
            raise InvalidRequest("Give either 'tools' or 'functions', not both.", param="functions")
        if self.chat_template_kwargs:
            check_arguments(self.chat_template_kwargs, "chat_template_kwargs")
        for index, message in enumerate(self.messages):
            _check(message, f"messages[{index}]")
        declared, choice = tools(self), tool_choice(self)
        if declared or choice != ToolChoice():
            check_tools(declared, "functions" if self.functions else "tools")
            check_choice(choice, declared, "function_call" if self.functions else "tool_choice")

    @property
    def legacy(self) -> bool:
        """Whether the answer has `function_call`, because the request has `functions`."""
        return bool(self.functions)


def tools(request: ChatRequest) -> tuple[Tool, ...]:
    """Return the request's tools. Raises InvalidRequest for one that is no function, or not a valid one."""
    declared = []
    for index, spec in enumerate(request.tools or ()):
        where = f"tools[{index}]"
        if spec.type != "function" or spec.function is None:
            raise InvalidRequest(
                f"'{where}' must be of type 'function' and have a 'function', got type {spec.type[:40]!r}.",
                param=f"{where}.type" if spec.type != "function" else f"{where}.function",
            )
        function = spec.function
        declared.append(
            tool(function.name, function.description, function.parameters, function.strict, f"{where}.function")
        )
    for index, function in enumerate(request.functions or ()):
        where = f"functions[{index}]"
        declared.append(tool(function.name, function.description, function.parameters, function.strict, where))
    return tuple(declared)


def tool_choice(request: ChatRequest) -> ToolChoice:
    """Return the request's tool choice. Raises InvalidRequest for a kind of choice that is not supported."""
    if isinstance(request.function_call, FunctionName):
        return ToolChoice("required", (request.function_call.name,))
    choice = request.function_call or request.tool_choice or "auto"
    if isinstance(choice, str):
        return ToolChoice(choice)
    if choice.type == "function" and choice.function is not None:
        return ToolChoice("required", (choice.function.name,))
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        names = tuple(each.function.name for each in choice.allowed_tools.tools if each.function is not None)
        if len(names) < len(choice.allowed_tools.tools) or not names:
            place = "tool_choice.allowed_tools.tools"
            raise InvalidRequest(f"'{place}' must be functions with a name, and at least one.", param=place)
        return ToolChoice(choice.allowed_tools.mode, names)
    allowed = "'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools' with that field"
    raise InvalidRequest(f"'tool_choice' must be {allowed}, got type {choice.type[:40]!r}.", param="tool_choice")


def _check(message: Message, where: str) -> None:
    content = message.content
    if content is UNSET and message.role != "assistant":
        raise InvalidRequest(
            f"'{where}.content' is missing; it must be a string or an array of parts.", param=f"{where}.content"
        )
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]")
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(
            f"'{where}.tool_call_id' is missing; a message with role 'tool' must name the call that it answers.",
            param=f"{where}.tool_call_id",
        )
    for index, call in enumerate(_calls(message)):
        check_arguments(_object(call.function), f"{where}.tool_calls[{index}].function.arguments")


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
    options = request.chat_template_kwargs or {}
    enabled = request.enable_thinking
    if enabled is None and request.reasoning_effort is not None:
        enabled = request.reasoning_effort != "none"
    return Conversation(
        messages=template_messages(request.messages),
        tools=tools(request),
        tools_field="functions[{}].parameters" if request.legacy else "tools[{}].function.parameters",
        tool_choice=tool_choice(request),
        parallel=request.parallel_tool_calls is not False and not request.legacy,
        reasoning=ReasoningOptions(enabled, request.reasoning_effort, None, options),
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
    if reasoning := message.reasoning_content or message.reasoning:
        fields["reasoning_content"] = reasoning
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
    return arguments_object(call.arguments) if isinstance(call.arguments, str) else call.arguments


ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class MadeFunction(Struct):
    """`arguments` is the JSON text of an object. It is incomplete if the answer was cut."""

    name: str
    arguments: str


class MadeCall(Struct):
    id: str
    function: MadeFunction
    type: Literal["function"] = "function"


class AssistantMessage(Struct):
    """`reasoning_content` extends OpenAI's shape. `function_call` answers a request with `functions`."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()
    tool_calls: list[MadeCall] | UnsetType = UNSET
    function_call: MadeFunction | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class Choice(Struct):
    """`finish_cause` extends OpenAI's shape: what cut the answer. It is absent unless `finish_reason` is "length"."""

    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
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


class FunctionDelta(Struct, omit_defaults=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CallDelta(Struct, omit_defaults=True):
    """The beginning of a call, with its id and name, or the next part of its arguments."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET


class ChunkDelta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[CallDelta, ...] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChunkChoice(Struct):
    """`finish_cause` extends OpenAI's shape; see `Choice`."""

    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None = None
    finish_reason: ChatFinishReason | None = None
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


def deltas(events: Iterable[Event], calls: CallWriter) -> list[ChunkDelta]:
    """Return the chunk deltas of one step's events. Text in a row is one of them, and so is reasoning."""
    written: list[ChunkDelta] = []
    for event in events:
        last = written[-1] if written else ChunkDelta()
        match event:
            case Text(text) if isinstance(last.content, str):
                last.content += text
            case Text(text):
                written.append(ChunkDelta(content=text))
            case Reasoning(text) if isinstance(last.reasoning_content, str):
                last.reasoning_content += text
            case Reasoning(text):
                written.append(ChunkDelta(reasoning_content=text))
            case Call(name, _):
                written.append(calls.begin(name))
            case Arguments(text):
                written.append(calls.go_on(text))
    return written


class CallWriter:
    """Writes the calls of one choice. `legacy` writes the first one as `function_call`."""

    def __init__(self, *, legacy: bool) -> None:
        self._legacy = legacy
        self._index = -1

    def begin(self, name: str) -> ChunkDelta:
        self._index += 1
        function = FunctionDelta(name, "")
        if self._legacy:
            return ChunkDelta(function_call=function)
        return ChunkDelta(tool_calls=(CallDelta(self._index, f"call_{os.urandom(12).hex()}", "function", function),))

    def go_on(self, arguments: str) -> ChunkDelta:
        function = FunctionDelta(arguments=arguments)
        if self._legacy:
            return ChunkDelta(function_call=function)
        return ChunkDelta(tool_calls=(CallDelta(self._index, function=function),))


def fold(chunks: list[Chunk], *, logprobs: bool) -> Completion:
    """Fold the chunks of a finished stream into a completion. The last chunk must have the usage.

    Every choice starts with a chunk that has its role and ends with one that has its finish reason.
    """
    choices: dict[int, Choice] = {}
    for chunk in chunks:
        for part in chunk.choices:
            # 1) The first chunk of a choice creates it.
            choice = choices.get(part.index)
            if choice is None:
                choice = choices[part.index] = Choice(part.index, AssistantMessage(None), "stop")
                choice.logprobs = Logprobs([]) if logprobs else None
            # 2) Text, reasoning, calls and logprobs accumulate.
            _add(choice.message, part.delta)
            if part.logprobs is not None and choice.logprobs is not None:
                choice.logprobs.content.extend(part.logprobs.content)
            # 3) The last chunk of a choice says why it ended.
            if part.finish_reason is not None:
                choice.finish_reason, choice.finish_cause = part.finish_reason, part.finish_cause
    last = chunks[-1]
    assert isinstance(last.usage, Usage)
    ordered = [choices[index] for index in sorted(choices)]
    for choice in ordered:  # OpenAI's content is null only next to a call
        message = choice.message
        if message.content is None and message.tool_calls is UNSET and message.function_call is UNSET:
            message.content = ""
    return Completion(last.id, last.created, last.model, ordered, last.usage, last.system_fingerprint)


def _add(message: AssistantMessage, delta: ChunkDelta) -> None:
    if delta.content is not UNSET and delta.content:
        message.content = (message.content or "") + delta.content
    if delta.reasoning_content is not UNSET:
        message.reasoning_content = (message.reasoning_content or "") + delta.reasoning_content
    for call in delta.tool_calls or ():
        assert call.function is not UNSET
        if call.id is not UNSET:
            message.tool_calls = [
                *(message.tool_calls or ()),
                MadeCall(call.id, MadeFunction(call.function.name or "", "")),
            ]
        if call.function.arguments is not UNSET and message.tool_calls:
            message.tool_calls[-1].function.arguments += call.function.arguments
    if delta.function_call is not UNSET:
        if delta.function_call.name is not UNSET:
            message.function_call = MadeFunction(delta.function_call.name, "")
        if delta.function_call.arguments is not UNSET and message.function_call:
            message.function_call.arguments += delta.function_call.arguments
