"""Anthropic's messages: the request, its translation, the events of a stream, and the message that they add up to.

Fields that are not listed here (`metadata`, `service_tier`, `cache_control`, `betas`, ...) have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from core.conversation import Conversation, ReasoningOptions, Tool, ToolChoice
from core.engine.interface import Arguments, Call, CallEnd, Delta, Event, Reasoning, Sampling, Text
from core.errors import InvalidRequest
from core.wire.fields import MaxTokens, Probability, StopString, TopK, sampler_temperature
from core.wire.tools import check_arguments, check_choice, check_tools, tool

MAX_STOPS = 64

# Claude Code sends this line first, and it differs in each request: with it, no prompt prefix would ever be reused.
BILLING_LINE = "x-anthropic-billing-header:"

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Block(Struct):
    """A content block of the request. Which fields it has depends on its type."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None


class Message(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolSpec(Struct):
    """A tool. Anthropic's own server tools have another type; the model does not see them."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def is_function(self) -> bool:
        return self.type in (None, "custom")


class ToolChoiceSpec(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: MaxTokens | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Struct, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoiceSpec | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    thread: Any = None

    def __post_init__(self) -> None:
        if self.thread is not None:
            raise InvalidRequest(
                "'thread' is not supported: this server keeps no conversations. Send all messages in each request.",
                param="thread",
            )
        for index, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for place, block in enumerate(message.content):
                    _check(block, message.role, f"messages[{index}].content[{place}]")
        if isinstance(self.system, list):
            for place, block in enumerate(self.system):
                _check(block, "system", f"system[{place}]")
        if self.messages[-1].role == "assistant":
            raise InvalidRequest(
                "The last message is the assistant's; continuing it is not supported. End with a user message.",
                param="messages",
            )
        declared = tools(self)
        check_tools(declared, "tools")
        check_choice(tool_choice(self), declared)


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: MaxTokens
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    stream: bool | None = None


def _check(block: Block, role: str, where: str) -> None:
    allowed: dict[str, tuple[str, ...]] = {
        "user": ("text", "tool_result"),
        "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
        "system": ("text",),
        "tool_result": ("text",),
    }
    fields = {"text": ("text",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",), "thinking": ("thinking",)}
    if block.type not in allowed[role]:
        names = ", ".join(f"'{name}'" for name in allowed[role])
        raise InvalidRequest(
            f"'{where}.type' must be one of {names} here, got {block.type[:40]!r}: this model only reads text.",
            param=f"{where}.type",
        )
    for field in fields.get(block.type, ()):
        if getattr(block, field) is None:
            raise InvalidRequest(f"'{where}.{field}' is missing; it must be a string.", param=f"{where}.{field}")
    check_arguments(block.input, f"{where}.input")
    if isinstance(block.content, list):
        for index, inner in enumerate(block.content):
            _check(inner, "tool_result", f"{where}.content[{index}]")


def tools(request: CountRequest) -> tuple[Tool, ...]:
    """Return the tools that the model sees."""
    return tuple(
        tool(spec.name, spec.description, spec.input_schema, spec.strict, f"tools[{index}]")
        for index, spec in enumerate(request.tools or ())
        if spec.is_function
    )


def tool_choice(request: CountRequest) -> ToolChoice:
    choice = request.tool_choice
    match None if choice is None else choice.type:
        case "any":
            return ToolChoice("required")
        case "none":
            return ToolChoice("none")
        case "tool":
            assert choice is not None
            if choice.name is None:
                raise InvalidRequest("'tool_choice.name' is missing; it must name a tool.", param="tool_choice.name")
            return ToolChoice("required", (choice.name,))
    return ToolChoice("auto")


def conversation(request: CountRequest) -> Conversation:
    """Translate the request."""
    choice, thinking, output = request.tool_choice, request.thinking, request.output_config
    neutral = Conversation(
        messages=_template_messages(request),
        tools=tools(request),
        tools_field="tools[{}].input_schema",
        tool_choice=tool_choice(request),
        parallel=not (choice and choice.disable_parallel_tool_use),
        schema=output.format.schema if output and output.format else None,
        schema_field="output_config.format.schema",
        reasoning=ReasoningOptions(
            enabled=None if thinking is None else thinking.type != "disabled",
            effort=output.effort if output else None,
            budget=thinking.budget_tokens if thinking else None,
        ),
    )
    if not isinstance(request, MessagesRequest):
        return neutral
    fields = {
        "temperature": None if request.temperature is None else sampler_temperature(request.temperature),
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),
    }
    sampling = Sampling(**{name: value for name, value in fields.items() if value is not None})  # type: ignore[arg-type]
    stops = tuple(request.stop_sequences or ())
    return replace(neutral, sampling=sampling, max_tokens=request.max_tokens, stop=stops)


def _template_messages(request: CountRequest) -> list[dict[str, Any]]:
    """Return the messages as chat templates expect them.

    Leading system messages join `system`. Later ones stay in place as user text: moving them would change the prefix of
    the prompt. Results come before text, because templates expect them directly after the calls.
    """
    system = [text for text in _texts(request.system or "") if not text.startswith(BILLING_LINE)]
    messages = list(request.messages)
    while messages and messages[0].role == "system":
        system += _texts(messages.pop(0).content)
    written: list[dict[str, Any]] = []
    if system:
        written.append({"role": "system", "content": "\n\n".join(system)})
    for message in messages:
        if message.role == "assistant":
            written.append(_assistant(message))
            continue
        blocks = [] if isinstance(message.content, str) else message.content
        written += [
            {"role": "tool", "content": _result(block), "tool_call_id": block.tool_use_id}
            for block in blocks
            if block.type == "tool_result"
        ]
        if text := "\n".join(_texts(message.content)):
            if message.role == "system":
                text = f"<system-reminder>\n{text}\n</system-reminder>"
            _add_user_text(written, text)
    return written


def _add_user_text(written: list[dict[str, Any]], text: str) -> None:
    """Add user text. Text in a row is one message: many templates want the roles to alternate."""
    if written and written[-1]["role"] == "user":
        written[-1]["content"] += "\n" + text
    else:
        written.append({"role": "user", "content": text})


def _assistant(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": "assistant", "content": "\n".join(_texts(message.content))}
    blocks = [] if isinstance(message.content, str) else message.content
    if reasoning := "\n".join(block.thinking for block in blocks if block.thinking):
        fields["reasoning_content"] = reasoning
    calls = [block for block in blocks if block.type == "tool_use"]
    if calls:
        fields["tool_calls"] = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}
            for block in calls
        ]
    return fields


def _result(block: Block) -> str:
    text = "\n".join(_texts(block.content or ""))
    return f"Error: {text}" if block.is_error else text


def _texts(content: str | list[Block]) -> list[str]:
    """Return the texts of a string or of text blocks, without empty ones."""
    texts = [content] if isinstance(content, str) else [block.text or "" for block in content if block.type == "text"]
    return [text for text in texts if text]


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    """`signature` is no proof of anything. Clients send it back, and it is not read."""

    thinking: str
    signature: str


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    """`input` is the object that the arguments are. It is empty at the start of a stream, and if a call was cut."""

    id: str
    name: str
    input: Any


class Usage(Struct):
    """`input_tokens` leaves out the tokens that the prefix cache held."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnswerMessage(Struct):
    id: str
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    usage: Usage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class TokenCount(Struct):
    input_tokens: int


class MessageStart(Struct):
    message: AnswerMessage
    type: Literal["message_start"] = "message_start"


class BlockStart(Struct):
    index: int
    content_block: TextBlock | ThinkingBlock | ToolUseBlock
    type: Literal["content_block_start"] = "content_block_start"


class BlockDelta(Struct, omit_defaults=True):
    """What a block gains. `type` is text_delta, thinking_delta, signature_delta or input_json_delta."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET


class ContentDelta(Struct):
    index: int
    delta: BlockDelta
    type: Literal["content_block_delta"] = "content_block_delta"


class BlockStop(Struct):
    index: int
    type: Literal["content_block_stop"] = "content_block_stop"


class EndDelta(Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct):
    delta: EndDelta
    usage: Usage
    type: Literal["message_delta"] = "message_delta"


class MessageStop(Struct):
    type: Literal["message_stop"] = "message_stop"


class ErrorBody(Struct):
    type: str
    message: str


class ErrorEvent(Struct):
    error: ErrorBody
    type: Literal["error"] = "error"


class ErrorEnvelope(Struct):
    """Anthropic's error. `request_id` is also in the header `request-id`."""

    error: ErrorBody
    request_id: str
    type: Literal["error"] = "error"


StreamEvent = MessageStart | BlockStart | ContentDelta | BlockStop | MessageDelta | MessageStop


class BlockWriter:
    """Writes the events of one answer as content blocks, one after the other."""

    def __init__(self, new_id: Callable[[str], str]) -> None:
        self._new_id = new_id
        self._index = -1
        self._open: str | None = None  # the type of the open block

    def write(self, events: Iterable[Event]) -> Iterator[StreamEvent]:
        """Yield the block events of one step's events."""
        for event in events:
            match event:
                case Text(text):
                    yield from self._begin("text", TextBlock(""))
                    yield self._delta(BlockDelta("text_delta", text=text))
                case Reasoning(text):
                    yield from self._begin("thinking", ThinkingBlock("", ""))
                    yield self._delta(BlockDelta("thinking_delta", thinking=text))
                case Call(name, _):
                    yield from self.close()
                    yield from self._begin("tool_use", ToolUseBlock(self._new_id("toolu"), name, {}))
                case Arguments(text):
                    yield self._delta(BlockDelta("input_json_delta", partial_json=text))
                case CallEnd():
                    yield from self.close()

    def close(self) -> Iterator[StreamEvent]:
        """Yield the end of the open block."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta(BlockDelta("signature_delta", signature=self._new_id("sig")))
        self._open = None
        yield BlockStop(self._index)

    def _begin(self, kind: str, block: TextBlock | ThinkingBlock | ToolUseBlock) -> Iterator[StreamEvent]:
        if self._open == kind:
            return
        yield from self.close()
        self._index += 1
        self._open = kind
        yield BlockStart(self._index, block)

    def _delta(self, delta: BlockDelta) -> ContentDelta:
        return ContentDelta(self._index, delta)


def stop_reason(delta: Delta, stops: tuple[str, ...]) -> EndDelta:
    """Return why the answer ended, from its last delta."""
    if delta.finish_reason == "tool_calls":
        return EndDelta("tool_use", None)
    if delta.finish_reason == "length":
        return EndDelta("model_context_window_exceeded" if delta.cause == "context" else "max_tokens", None)
    if delta.stop is not None and delta.stop in stops:
        return EndDelta("stop_sequence", delta.stop)
    return EndDelta("end_turn", None)


def fold(events: list[StreamEvent]) -> AnswerMessage:
    """Fold the events of a finished stream into the message that they add up to."""
    start = events[0]
    assert isinstance(start, MessageStart)
    message, arguments = start.message, ""
    for event in events[1:]:
        match event:
            case BlockStart(_, block):
                message.content.append(block)
                arguments = ""
            case ContentDelta(_, delta):
                block = message.content[-1]
                match block:
                    case TextBlock():
                        block.text += delta.text or ""
                    case ThinkingBlock():
                        block.thinking += delta.thinking or ""
                        block.signature += delta.signature or ""
                    case ToolUseBlock():
                        arguments += delta.partial_json or ""
            case BlockStop():
                block = message.content[-1]
                if isinstance(block, ToolUseBlock):
                    block.input = _whole(arguments)
            case MessageDelta(end, usage):
                message.stop_reason, message.stop_sequence, message.usage = end.stop_reason, end.stop_sequence, usage
    return message


def _whole(arguments: str) -> Any:
    try:
        return msgspec.json.decode(arguments) if arguments else {}
    except msgspec.DecodeError:  # the call was cut
        return {}
