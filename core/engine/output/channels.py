"""Read harmony, the form of gpt-oss: a turn is a series of messages, and each names its channel and its recipient.

<|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>final<|message|>text
<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
"""

from __future__ import annotations

import re

from core.engine.output.sequence import SequenceParser
from core.engine.output.source import EndOfText, Mismatch, Reading, Targets

_WORD = re.compile(r"[^\s<\ud800-\udfff]+")
_FUNCTIONS = "to=functions."
_RECIPIENT = "to="
_SEPARATOR = "\n\n"  # between the texts of two messages


class ChannelParser(SequenceParser):
    """The parser of one sequence of harmony. The prompt ends where a message's header is due, or in reasoning."""

    def _turn(self) -> Reading[None]:
        encode = self._source.encode
        self._start, self._channel, self._message = map(encode, ("<|start|>", "<|channel|>", "<|message|>"))
        self._constraint = encode("<|constrain|>")
        ends = Targets([*map(encode, ("<|end|>", "<|call|>", "<|return|>")), self._start, self._channel])
        self._targets = ends
        end = ""
        if self.reasoning:
            end = yield from self._reason(ends)
        separator = ""
        while True:
            channel, tool = yield from self._header(end)
            if tool is not None:
                yield from self._tool_call(tool)
            elif channel == "analysis":
                end = yield from self._reason(ends)
                continue
            else:
                self._space += separator
                separator = _SEPARATOR
            end = yield from self._text(ends)
            self._space = ""

    def _header(self, end: str) -> Reading[tuple[str, str | None]]:
        """Read a header up to and with its last marker. Return the channel and the tool that is called.

        `end` is what ended the message before: perhaps the first marker of this header. What is no header is text.
        """
        source = self._source
        source.record(end if end in (self._start, self._channel) else "")
        try:
            return (yield from self._words(end))
        except Mismatch:
            self.calling = False
            self._space, text = "", source.recorded()
            self._add_text(text)
            return "final", None
        except EndOfText:
            self.calling = False
            source.rest()
            text = source.recorded()
            if not self._cut and not text.lstrip().startswith((self._start, self._channel, self._message)):
                self._add_text(text)
                self._flush()
            raise

    def _words(self, end: str) -> Reading[tuple[str, str | None]]:
        source = self._source
        channel, tool = "", None
        marker = end if end in (self._start, self._channel) else ""
        while True:
            yield from source.spaces()
            following = yield from self._marker()
            if following == self._message:
                return channel, tool
            if following:
                marker = following
            elif self._tools and (yield from source.literal(_FUNCTIONS)):
                self._constrain("")
                tool = yield from self._name()
                marker = marker or self._channel
            elif not marker:
                raise Mismatch
            else:
                word = yield from source.word(_WORD)
                if not word or word.startswith(_RECIPIENT):
                    raise Mismatch(word)
                if marker == self._channel and not channel:
                    channel = word

    def _marker(self) -> Reading[str]:
        """Read a header's marker if one comes next."""
        for marker in (self._message, self._channel, self._start, self._constraint):
            if (yield from self._source.literal(marker)):
                return marker
        return ""

    def _tool_call(self, tool: str) -> Reading[None]:
        source = self._source
        self._call(tool)
        try:
            yield from self._object_arguments(self._add_arguments)
            self._end_call()
            source.recorded()
            yield from source.spaces()
        except Mismatch:
            pass  # the rest is text
        finally:
            self.calling = self._call_open = False

    def _text(self, ends: Targets) -> Reading[str]:
        """Read text up to and with the end of its message. Return that."""
        try:
            return (yield from self._source.until(ends, self._add_text))
        except EndOfText:
            if not self._cut:
                self._add_text(self._source.rest())
            if not self._after_call:
                self._flush()
            raise
