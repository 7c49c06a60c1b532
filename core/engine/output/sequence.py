"""Turn what a model writes into events: its reasoning, its text, and its tool calls as its family writes them.

What does not parse is text, never an error. Tools that were not declared are text, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from core.engine.interface import Arguments, Call, CallEnd, Event, Piece, Reasoning, Text
from core.engine.output import literals, tagged
from core.engine.output.families import Family
from core.engine.output.source import SPACE, EndOfText, Mismatch, Out, Reading, Source, Targets

_NAME = re.compile(r"[^\s\[\]<>{}()\"'`=,:;|\ud800-\udfff]+")
_IDENTIFIER = re.compile(r"\w+")
_ID = re.compile(r"[^\s\[{<\ud800-\udfff]+")


@dataclass(slots=True)
class _Draft:
    """What has been read of a call that is one JSON object. Its keys may come in any order."""

    bare: bool
    fenced: bool
    name: str | None = None
    id: str | None = None
    arguments: list[str] | None = None


class SequenceParser:
    """The parser of one sequence. It is one reader, which each piece resumes.

    Text is emitted at once, except for white space, which is dropped before a call. The source records what is read
    after a call's opener: if it is no call, it becomes text.
    """

    def __init__(
        self, family: Family, tools: Mapping[str, Mapping[str, Any]], markers: frozenset[str], *, reasoning_open: bool
    ) -> None:
        source = self._source = Source(markers)
        self._family = family
        self._tools = tools
        self.reasoning = reasoning_open
        self.calling = False
        self.overrun = ""
        self._events: list[Event] = []
        self._space = ""  # white space that is emitted if text follows
        self._begun = False  # whether text was emitted since the turn, its reasoning or its last call began
        self._thought = False  # whether reasoning was emitted
        self._after_call = False
        self._call_open = False  # a Call without its CallEnd
        self._arguments_whole = False
        self._cut = False
        # 1) The family's texts as the source shows them. White space around a marker is free.
        self._think_opener = source.encode(family.think.opener).strip(SPACE)
        self._think_closer = source.encode(family.think.closer).strip(SPACE)
        openers = [family.opener, *family.variants] if tools else []
        self._openers = {source.encode(opener).strip(SPACE): opener for opener in openers if opener}
        self._heads = tuple(source.encode(head) for head in family.heads) if tools else ()
        sections = (family.section, family.section_closer) if tools else ()
        self._sections = tuple(source.encode(text) for text in sections if text)
        self._closer_parts = source.encode(family.closer).split()
        # 2) What may interrupt text. Reasoning in the middle of text begins with a marker, or it is text.
        interleaved = [self._think_opener] if source.begins_with_marker(self._think_opener) else []
        self._targets = Targets([*self._openers, *self._heads, *self._sections, *interleaved])
        self._dialect = literals.Dialect("braces", Targets([source.encode(family.quote)]))
        self._reader = self._read()
        next(self._reader)

    # What the engine calls.

    def feed(self, piece: Piece) -> list[Event]:
        self.overrun = ""
        self._source.add(piece)
        next(self._reader)
        return self._take()

    def reject(self) -> list[Event]:
        if self.calling:
            self._reader.throw(Mismatch())
        return self._take()

    def finish(self, *, cut: bool) -> list[Event]:
        self._cut = cut
        self._source.ended = True
        next(self._reader, None)
        return self._take()

    # Events.

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _add_text(self, text: str) -> None:
        """Add text. White space at its end waits for what follows, which may be a call."""
        text = self._space + text
        ready = text.rstrip(SPACE) if self._tools else text
        self._space = text[len(ready) :]
        if ready:
            self._begun, self._after_call = True, False
            self._add(Text, self._source.plain(ready))

    def _add_reasoning(self, text: str) -> None:
        """Add reasoning, without white space around it."""
        text = self._space + text if self._thought else text.lstrip(SPACE)
        ready = text.rstrip(SPACE)
        self._space = text[len(ready) :]
        if ready:
            self._thought = True
            self._add(Reasoning, self._source.plain(ready))

    def _add_arguments(self, text: str) -> None:
        if text:
            self._add(Arguments, text)

    def _add(self, kind: type[Text] | type[Reasoning] | type[Arguments], text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            self._events[-1] = kind(last.text + text)
        else:
            self._events.append(kind(text))

    def _call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call. From here on it is no text any more."""
        self._source.recorded()
        self._events.append(Call(name, call_id))
        self._call_open, self._arguments_whole = True, False

    def _end_call(self) -> None:
        self._events.append(CallEnd())
        self._call_open, self._after_call, self._begun = False, True, False
        self._source.record()

    # The reader of a turn.

    def _read(self) -> Reading[None]:
        try:
            yield from self._turn()
        except EndOfText:
            return

    def _turn(self) -> Reading[None]:
        if self.reasoning:
            yield from self._reason(Targets([self._think_closer]))
        while True:
            opener = yield from self._until_opener()
            if opener == self._think_opener:
                self._space = ""
                yield from self._reason(Targets([self._think_closer]))
            elif opener not in self._sections:
                yield from self._attempt(opener)

    def _until_opener(self) -> Reading[str]:
        """Read text up to and with what begins a call or reasoning. Return that, "" for a call without opener."""
        source = self._source
        try:
            if not self._begun:
                self._space += yield from source.spaces()
                if (yield from source.literal(self._think_opener)):
                    return self._think_opener
                if self._family.bare and self._tools and (yield from source.ahead(1)) in "{`":
                    return ""
            return (yield from source.until(self._targets, self._add_text))
        except EndOfText:
            rest = source.rest()
            if not (self._cut and rest):  # at a cut, what may begin a marker is dropped
                self._add_text(rest)
            if not self._after_call:
                self._flush()
            raise

    def _flush(self) -> None:
        if self._space:
            self._add(Text, self._space)
            self._space = ""

    def _reason(self, closers: Targets) -> Reading[str]:
        """Read reasoning up to and with its closer. Return that."""
        self.reasoning, self._space = True, "\n\n" if self._thought else ""
        try:
            closer = yield from self._source.until(closers, self._add_reasoning)
        except EndOfText:
            if not self._cut:
                self._add_reasoning(self._source.rest())
            raise
        self.reasoning, self._space, self._begun = False, "", False
        yield from self._source.spaces()
        return closer

    # Calls.

    def _attempt(self, opener: str) -> Reading[None]:
        """Read calls after their opener. If it is no call, emit what was read as text."""
        source = self._source
        source.record(self._space + opener)
        self._space = ""
        if not opener:
            self._begun = True  # a message begins once: if this is no call, the rest is text
        try:
            if opener in self._openers:
                yield from self._open(self._openers[opener])
            yield from self._calls(opener)
            yield from self._close(opener)
        except Mismatch:
            self._add_text(source.recorded())
        except EndOfText:
            self._give_up(opener)
            raise
        finally:
            self.calling = self._call_open = False

    def _give_up(self, opener: str) -> None:
        """The sequence has ended inside a call. End a whole one; what has no name yet becomes text."""
        source = self._source
        if self._call_open:
            if self._arguments_whole and not self._cut:
                self._end_call()
        elif source.recording and (not self._cut or opener == ""):
            source.rest()
            self._add_text(source.recorded())
            if not self._after_call:
                self._flush()

    def _open(self, opener: str) -> Reading[None]:
        """Read the white space that belongs to an opener. Any other is accepted, too."""
        source = self._source
        if opener.strip(SPACE) != opener:
            yield from source.ahead(1)
        source.take_spaces()
        self._constrain("")

    def _constrain(self, before: str) -> None:
        """From here on, the call's grammar holds. `before`: what belongs to the call and has been read."""
        self.calling = True
        self.overrun = self._source.plain(before + self._source.unread())

    def _calls(self, opener: str) -> Reading[None]:
        form = self._family.form
        if form == "object":
            yield from self._object_call(bare=opener == "")
        elif form == "array":
            yield from self._array_calls()
        elif form == "named":
            yield from self._named_call()
        elif form == "tagged":
            yield from self._tagged_call(opener)
        elif form == "python":
            yield from self._python_calls()
        else:
            yield from self._braces_call()

    def _close(self, opener: str) -> Reading[None]:
        """Read the closer. A model may leave it out."""
        source = self._source
        source.recorded()
        if not self._closer_parts or opener == "":
            return
        for part in self._closer_parts:
            spaces = yield from source.spaces()
            if not (yield from source.literal(part)):
                self._space = spaces
                return

    def _known(self, name: str) -> None:
        if name not in self._tools:
            raise Mismatch(name)

    def _name(self) -> Reading[str]:
        """Read the name of a tool, up to the first character that no tool's name has there."""
        parts: list[str] = []

        def grow(text: str) -> None:
            parts.append(text)
            name = "".join(parts)
            if not any(tool.startswith(name) for tool in self._tools):
                raise Mismatch(name)

        yield from self._source.spaces()
        yield from self._source.run(_NAME, grow)
        name = "".join(parts)
        self._known(name)
        return name

    def _choice(self, options: Collection[str]) -> Reading[str]:
        """Read a JSON string that is one of some texts, up to the first character that none of them has there."""
        parts: list[str] = []
        longest = 6 * max(map(len, options))  # as escapes

        def grow(text: str) -> None:
            parts.append(text)
            begin = "".join(parts)[1:].removesuffix('"')
            possible = len(begin) <= longest if "\\" in begin else any(option.startswith(begin) for option in options)
            if not possible:
                raise Mismatch(begin)

        yield from literals.string(self._source, grow)
        text = literals.text_of("".join(parts))
        if text not in options:
            raise Mismatch(text)
        return text

    def _object_arguments(self, out: Out) -> Reading[None]:
        """Read the arguments of a call: a JSON object, one in a string, or null."""
        source = self._source
        char = yield from source.symbol()
        if char == "{":
            yield from literals.value(source, literals.JSON, out)
            return
        parts: list[str] = []
        yield from literals.scalar(source, literals.JSON, parts.append)
        text: str | None = "".join(parts)
        if text == "null":
            text = "{}"
        elif char == '"':
            text = literals.literal_of(literals.text_of("".join(parts)))
        if text is None or not text.startswith("{"):
            raise Mismatch(text)
        out(text)

    def _object_call(self, *, bare: bool = False) -> Reading[None]:
        """Read {"name": "NAME", "arguments": {...}}. Other keys are skipped, but a bare call has none except "type"."""
        source = self._source
        draft = _Draft(bare=bare, fenced=bare and (yield from source.literal("```")))
        if draft.fenced:
            yield from source.literal("json")
        yield from source.expect("{")
        while not (yield from source.accept("}")):
            yield from self._member(draft)
            if not (yield from source.accept(",")):
                yield from source.expect("}")
                break
        if draft.name is None:
            raise Mismatch
        if not self._call_open:
            self._call(draft.name, draft.id)
        if draft.arguments is None:
            self._add_arguments("{}")
        self._end_call()
        if draft.fenced:
            yield from source.accept("```")

    def _member(self, draft: _Draft) -> Reading[None]:
        """Read one key of a call and its value. An id that only counts calls is no id: the next turn has it, too."""
        source, family = self._source, self._family
        arguments_keys = (family.arguments_key, "arguments", "parameters")
        if draft.bare:
            key = yield from self._choice((*arguments_keys,) if draft.name else (family.name_key, "type"))
        else:
            key = literals.text_of((yield from self._json_string()))
        yield from source.expect(":")
        if key == family.name_key and draft.name is None:
            if draft.bare and (yield from source.symbol()) == '"':
                # The grammar has one way to write this.
                self._constrain(f'{{"{key}": ')
            draft.name = yield from self._choice(self._tools)
            if not draft.bare:
                self._call(draft.name, draft.id)
                self._add_arguments("".join(draft.arguments or ()))
                self._arguments_whole = draft.arguments is not None
        elif key in arguments_keys and draft.arguments is None:
            if draft.bare and draft.name is not None:
                self._call(draft.name)
            draft.arguments = []
            yield from self._object_arguments(self._add_arguments if self._call_open else draft.arguments.append)
            self._arguments_whole = True
        elif key == family.id_key and family.id_length and (yield from source.symbol()) == '"':
            draft.id = literals.text_of((yield from self._json_string()))
        else:
            yield from literals.value(source, literals.JSON, _ignore)

    def _json_string(self) -> Reading[str]:
        parts: list[str] = []
        yield from literals.string(self._source, parts.append)
        return "".join(parts)

    def _array_calls(self) -> Reading[None]:
        source = self._source
        if not (yield from source.accept("[")):
            yield from self._object_call()
            return
        while not (yield from source.accept("]")):
            yield from self._object_call()
            if not (yield from source.accept(",")):
                yield from source.expect("]")
                return

    def _named_call(self) -> Reading[None]:
        source = self._source
        name = yield from self._name()
        call_id = None
        id_opener = source.encode(self._family.id_opener)
        if id_opener and (yield from source.accept(id_opener)):
            call_id = yield from source.word(_ID)
        for part in source.encode(self._family.middle).split():
            yield from source.expect(part)
        self._call(name, call_id)
        yield from self._object_arguments(self._add_arguments)
        self._end_call()

    def _tagged_call(self, opener: str) -> Reading[None]:
        source = self._source
        if opener not in self._heads:
            yield from source.expect(tagged.FUNCTION)
        name = yield from self._name()
        yield from source.expect(">")
        if opener in self._heads:
            self._constrain(f"{opener}{name}>")
        self._call(name)
        yield from tagged.arguments(source, self._tools[name], self._add_arguments, end=self._closer_parts[0])
        self._end_call()

    def _python_calls(self) -> Reading[None]:
        source = self._source
        bracket = yield from source.accept("[")
        while not (bracket and (yield from source.accept("]"))):
            if (yield from source.symbol()) == "{":
                yield from self._object_call()
            else:
                yield from self._python_call()
            if not (yield from source.accept(",")):
                if bracket:
                    yield from source.expect("]")
                return

    def _python_call(self) -> Reading[None]:
        """Read NAME(KEY=VALUE, ...)."""
        source = self._source
        name = yield from self._name()
        yield from source.expect("(")
        begun = False
        while not (yield from source.accept(")")):
            if begun:
                yield from source.expect(",")
                if (yield from source.accept(")")):
                    break
            key = yield from source.word(_IDENTIFIER)
            yield from source.expect("=")
            if not begun:
                self._call(name)
            self._add_arguments(f"{', ' if begun else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            begun = True
            yield from literals.value(source, literals.PYTHON, self._add_arguments)
        if not begun:
            self._call(name)
        self._add_arguments("}" if begun else "{}")
        self._end_call()

    def _braces_call(self) -> Reading[None]:
        source = self._source
        name = yield from self._name()
        if (yield from source.ahead(1)) != "{":
            raise Mismatch
        self._call(name)
        yield from literals.value(source, self._dialect, self._add_arguments)
        self._end_call()


def _ignore(text: str) -> None:
    """Ignore the value of a key that is not used."""
