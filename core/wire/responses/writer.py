"""Write the events of a stream from what the engine makes. A whole response is the one that the last event has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from core.engine.interface import Arguments, Call, CallEnd, Delta, Event, Reasoning, Text
from core.errors import ApiError
from core.wire.fields import Token, logprobs
from core.wire.responses import events
from core.wire.responses.answer import (
    CustomToolCall,
    FunctionCall,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
)
from core.wire.responses.events import StreamEvent
from core.wire.responses.tools import Declared, custom_input
from core.wire.responses.translation import encoded


def new_id(kind: str) -> str:
    return f"{kind}_{os.urandom(12).hex()}"


class Writer:
    """Writes one response. Items do not interleave: each one ends before the next begins.

    `declared` has the tools by the name that the model sees. `encrypted` writes `encrypted_content`.
    """

    def __init__(self, response: Response, declared: Mapping[str, Declared], *, encrypted: bool) -> None:
        self.response = response
        self._declared = declared
        self._encrypted = encrypted
        self._sequence_number = -1
        self._index = -1  # of the latest item
        self._item: OutputItem | None = None  # the open one
        self._pieces: list[str] = []  # of its text, reasoning or arguments
        self._logprobs: list[Token] = []  # of its text
        self._waiting: list[Token] = []  # logprobs whose text is held back

    def start(self) -> Iterator[StreamEvent]:
        """Yield the beginning of the response."""
        yield events.ResponseEvent(replace(self.response, output=[]), self._next(), "response.created")
        yield events.ResponseEvent(replace(self.response, output=[]), self._next(), "response.in_progress")

    def write(self, delta: Delta) -> Iterator[StreamEvent]:
        """Yield the events of one step."""
        self._waiting += logprobs(delta.logprobs).content
        for event in _joined(delta.events):
            match event:
                case Text(text):
                    if not isinstance(self._item, OutputMessage):
                        yield from self._begin(OutputMessage(new_id("msg"), "in_progress", []))
                    yield self._text(text)
                case Reasoning(text):
                    if not isinstance(self._item, ReasoningItem):
                        yield from self._begin(ReasoningItem(new_id("rs"), "in_progress", []))
                    yield self._reasoning(text)
                case Call(name, _):
                    yield from self._begin(self._call(name))
                case Arguments(text):
                    yield from self._arguments(text)
                case CallEnd():
                    yield from self._close("completed")
        if delta.events and not isinstance(self._item, OutputMessage):
            self._waiting = []

    def finish(self, delta: Delta, usage: ResponseUsage, completed_at: int) -> Iterator[StreamEvent]:
        """Yield the end of the open item. The caller ends the response with `end`."""
        cut = delta.finish_reason == "length"
        if self._waiting and isinstance(self._item, OutputMessage):
            yield self._text("")
        yield from self._close("incomplete" if cut else "completed")
        if not cut and all(isinstance(item, ReasoningItem) for item in self.response.output):
            yield from self._begin(OutputMessage(new_id("msg"), "in_progress", []))
            yield from self._close("completed")
        details = IncompleteDetails("max_output_tokens", delta.cause) if cut else None
        self.response = replace(
            self.response,
            status="incomplete" if cut else "completed",
            incomplete_details=details,
            completed_at=None if cut else completed_at,
            usage=usage,
        )

    def end(self) -> StreamEvent:
        """Return the last event, with the whole response."""
        kind = "response.incomplete" if self.response.status == "incomplete" else "response.completed"
        return events.ResponseEvent(self.response, self._next(), kind)  # type: ignore[arg-type]

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """Yield an error and the end of the response. Without events before it, the response begins first."""
        if self._sequence_number < 0:
            yield from self.start()
        yield from self._close("incomplete")
        code = error.code or error.type
        body = events.ErrorBody(error.type, code, error.message, error.param)
        yield events.ErrorEvent(code, error.message, error.param, body, self._next())
        failed = replace(self.response, status="failed", error=ResponseError(code, error.message), store=False)
        yield events.ResponseEvent(failed, self._next(), "response.failed")

    def _next(self) -> int:
        self._sequence_number += 1
        return self._sequence_number

    def _begin(self, item: OutputItem) -> Iterator[StreamEvent]:
        """Yield the end of the open item and the beginning of the next."""
        yield from self._close("completed")
        self._index += 1
        self._item, self._pieces, self._logprobs = item, [], []
        yield events.ItemEvent(self._index, replace(item), self._next(), "response.output_item.added")
        if isinstance(item, OutputMessage):
            yield self._part(OutputText("", [], []), "added")
        elif isinstance(item, ReasoningItem):
            yield self._part(ReasoningText(""), "added")

    def _part(self, part: OutputText | ReasoningText, step: str) -> StreamEvent:
        kind = f"response.content_part.{step}"
        return events.PartEvent(self._id, self._index, 0, part, self._next(), kind)  # type: ignore[arg-type]

    @property
    def _id(self) -> str:
        assert self._item is not None
        return self._item.id

    def _text(self, text: str) -> StreamEvent:
        self._pieces.append(text)
        tokens, self._waiting = self._waiting, []
        self._logprobs += tokens
        return events.TextDelta(self._id, self._index, 0, text, tokens, self._next())

    def _reasoning(self, text: str) -> StreamEvent:
        self._pieces.append(text)
        return events.ReasoningDelta(self._id, self._index, 0, text, self._next())

    def _call(self, name: str) -> OutputItem:
        declared = self._declared.get(name)
        if declared is None:
            return FunctionCall(new_id("fc"), new_id("call"), name, "", "in_progress")
        namespace = UNSET if declared.namespace is None else declared.namespace
        if declared.custom:
            return CustomToolCall(new_id("ctc"), new_id("call"), declared.name, "", "in_progress", namespace)
        return FunctionCall(new_id("fc"), new_id("call"), declared.name, "", "in_progress", namespace)

    def _arguments(self, text: str) -> Iterator[StreamEvent]:
        self._pieces.append(text)
        if isinstance(self._item, FunctionCall):
            kind = "response.function_call_arguments.delta"
            yield events.CallDelta(self._id, self._index, text, self._next(), kind)  # type: ignore[arg-type]

    def _close(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Yield the end of the open item. A cut call is not part of the response's output."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return
        item.status = status
        match item:
            case OutputMessage():
                part = OutputText(text, self._logprobs, [])
                item.content = [part]
                yield events.TextDone(item.id, self._index, 0, text, self._logprobs, self._next())
                yield self._part(part, "done")
            case ReasoningItem():
                item.content = [ReasoningText(text)]
                item.encrypted_content = encoded(text) if self._encrypted else None
                yield events.ReasoningDone(item.id, self._index, 0, text, self._next())
                yield self._part(item.content[0], "done")
            case FunctionCall():
                item.arguments = text
                if status == "completed":
                    yield events.ArgumentsDone(item.id, self._index, item.name, text, self._next())
            case CustomToolCall() if status == "completed":
                item.input = custom_input(text)
                kind = "response.custom_tool_call_input.delta"
                yield events.CallDelta(item.id, self._index, item.input, self._next(), kind)  # type: ignore[arg-type]
                yield events.CustomInputDone(item.id, self._index, item.input, self._next())
        yield events.ItemEvent(self._index, replace(item), self._next(), "response.output_item.done")
        if status == "completed" or isinstance(item, OutputMessage | ReasoningItem):
            self.response.output.append(item)
        self._item = None


def _joined(parts: Sequence[Event]) -> Iterator[Event]:
    """Yield the events of a step. Text in a row is one of them, and so are reasoning and arguments."""
    latest: Event | None = None
    for part in parts:
        match latest, part:
            case (Text(before), Text(text)):
                latest = Text(before + text)
            case (Reasoning(before), Reasoning(text)):
                latest = Reasoning(before + text)
            case (Arguments(before), Arguments(text)):
                latest = Arguments(before + text)
            case _:
                if latest is not None:
                    yield latest
                latest = part
    if latest is not None:
        yield latest


def fold(stream: Sequence[StreamEvent]) -> Response:
    """Return the response that the events of a finished stream add up to."""
    last = stream[-1]
    assert isinstance(last, events.ResponseEvent)
    return last.response
