"""Read one sequence's tokens: bytes to characters, characters and markers to events, text up to a stop string."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from core.engine.interface import Arguments, Call, CallEnd, Event, Parser, Piece, Text

if TYPE_CHECKING:
    from core.engine.interface import GenerationRequest
    from core.engine.vocabulary import Vocabulary


class TextStream:
    """Takes token bytes and returns the text that can be sent so far.

    The bytes of an incomplete character are held back, and dropped if it is never completed. Text that may begin a
    stop string is held back until that is decided. Bytes that are not UTF-8 become U+FFFD.
    """

    __slots__ = ("_decode", "_longest", "_withheld", "stop", "stops")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.stops = stops
        self._longest = max(map(len, stops), default=0)
        self._withheld = ""
        self.stop: str | None = None  # the stop string that was found; no more text comes

    def push(self, piece: bytes) -> str:
        """Add the bytes of a token. Return the text that can be sent now."""
        return self.push_text(self._decode(piece))

    def push_text(self, text: str) -> str:
        """Add whole characters. Return the text that can be sent now."""
        if not self.stops:
            return text
        if self.stop is not None:
            return ""
        # 1) A stop string ends the text, the earliest one if there are several.
        text = self._withheld + text
        places = [(place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.stop = min(places)
            self._withheld = ""
            return text[:place]
        # 2) Hold back what may begin one.
        length = len(text) - self._may_begin_stop(text)
        self._withheld = text[length:]
        return text[:length]

    def finish(self) -> str:
        """Return the text that was held back: it is no stop string after all. Drops an incomplete character."""
        text, self._withheld = self._withheld, ""
        return text

    def _may_begin_stop(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0


class OutputReader:
    """Reads the tokens of one sequence. Belongs to the engine thread.

    Without an output format, all tokens are text. Control tokens have no text; a parser sees those that its format
    names as markers. Stop strings are looked for in text only: a stop in a call's arguments would cut their JSON.
    """

    def __init__(self, vocabulary: Vocabulary, request: GenerationRequest) -> None:
        self._vocabulary = vocabulary
        self._markers = frozenset() if request.output is None else request.output.markers
        self._content = TextStream(request.stop)
        self._characters = TextStream()  # decodes what a parser reads
        self.parser: Parser | None = None if request.output is None else request.output.parser()
        self.repeated = False  # a call was made a second time
        self._calls: set[str] = set()  # calls that were made
        self._call = ""  # name and arguments of the call that is being read

    @property
    def stop(self) -> str | None:
        """The stop string that was found. No more events come."""
        return self._content.stop

    def push(self, tokens: list[int]) -> list[Event]:
        """Add tokens. Return the events that can be sent now."""
        pieces = self._vocabulary.piece
        if self.parser is None:
            return _text(self._content.push(b"".join(map(pieces, tokens))))
        events: list[Event] = []
        for token in tokens:
            label = self._marker(token)
            if label is not None:
                events += self.parser.feed(Piece(label, marker=True))
            elif text := self._characters.push(pieces(token)):
                events += self.parser.feed(Piece(text))
        return self._filter(events)

    def reject(self) -> list[Event]:
        """Return the text since a call was opened, which is no call after all."""
        return [] if self.parser is None else self._filter(self.parser.reject())

    def finish(self, *, cut: bool) -> list[Event]:
        """Return what was held back. `cut` means that a limit ended the sequence, not the model."""
        events = [] if self.parser is None else self._filter(self.parser.finish(cut=cut))
        return events + _text(self._content.finish())

    def _marker(self, token: int) -> str | None:
        """Return the token's text if the parser reads it as a marker."""
        if not self._markers:
            return None
        label = self._vocabulary.label(token).decode("utf-8", "replace")
        return label if label in self._markers else None

    def _filter(self, events: list[Event]) -> list[Event]:
        """Pass text through the search for stop strings. After one, nothing passes."""
        for event in events:
            self._note_call(event)
        if not self._content.stops:
            return events
        passed: list[Event] = []
        for event in events:
            if self._content.stop is not None:
                break
            if isinstance(event, Text):
                passed += _text(self._content.push_text(event.text))
            else:  # what was held back is older than this event
                passed += [*_text(self._content.finish()), event]
        return passed

    def _note_call(self, event: Event) -> None:
        """Notice a call that repeats an earlier one: a small model that may go on calling often does not stop."""
        match event:
            case Call(name):
                self._call = name
            case Arguments(text):
                self._call += text
            case CallEnd():
                self.repeated = self.repeated or self._call in self._calls
                self._calls.add(self._call)


def _text(text: str) -> list[Event]:
    return [Text(text)] if text else []
