"""Read text that arrives in pieces.

A reader is a generator. It yields where it needs more text, and goes on from there when more has been added. So a
reader looks as if it had all of the text, and no character is read twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from core.engine.interface import Piece

T = TypeVar("T")
Reading = Generator[None, None, T]
Out = Callable[[str], None]  # takes the next part of what is read

SPACE = " \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]+")
_FIRST_SYMBOL = 0xD800


class Mismatch(Exception):
    """The text is not what the reader expects. What it expected was not read."""


class EndOfText(Exception):
    """The sequence has ended and the reader needs more."""


class Targets:
    """Texts to search for. Where several begin at one place, the longest is found."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(sorted(filter(None, texts), key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._longest = len(self.texts[0]) if self.texts else 0

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def partial(self, text: str, start: int) -> int:
        """Return where the longest end of `text` begins that may become one of the texts, else the length of `text`."""
        for place in range(max(start, len(text) - self._longest + 1), len(text)):
            end = text[place:]
            if any(target.startswith(end) for target in self.texts):
                return place
        return len(text)


class Source:
    """The text of one sequence that has been added and not been read.

    A marker is one character in it: a lone surrogate, which no decoded text contains. So text that spells a marker is
    never taken for one, and readers compare characters only.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._symbols = {marker: chr(_FIRST_SYMBOL + number) for number, marker in enumerate(sorted(markers))}
        self._names = {ord(symbol): marker for marker, symbol in self._symbols.items()}
        # A marker may begin another one: replace the longest first.
        self._by_length = sorted(self._symbols, key=len, reverse=True)
        self.text = ""
        self.place = 0
        self.ended = False
        self._record: list[str] | None = None

    def encode(self, text: str) -> str:
        """Return text of a family with its markers as symbols."""
        for marker in self._by_length:
            text = text.replace(marker, self._symbols[marker])
        return text

    def plain(self, text: str) -> str:
        """Return text with its symbols as the markers' texts."""
        return text if text.isascii() else text.translate(self._names)

    def begins_with_marker(self, text: str) -> bool:
        return text[:1] in self._symbols.values()

    def add(self, piece: Piece) -> None:
        text = self._symbols.get(piece.text, piece.text) if piece.marker else piece.text
        self.text = self.text[self.place :] + text
        self.place = 0

    # What has been read since `record` becomes text if it is no call after all.

    @property
    def recording(self) -> bool:
        return self._record is not None

    def record(self, before: str = "") -> None:
        self._record = [before]

    def recorded(self) -> str:
        """Return what was read since `record`, and end the record."""
        text, self._record = "".join(self._record or ()), None
        return text

    # Readers.

    def take(self, count: int) -> str:
        text = self.text[self.place : self.place + count]
        self.place += count
        if self._record is not None:
            self._record.append(text)
        return text

    def put_back(self, text: str) -> None:
        """Undo that `text` was taken."""
        self.text, self.place = text + self.text[self.place :], 0
        if self._record is not None:
            self._record = ["".join(self._record).removesuffix(text)]

    def rest(self) -> str:
        """Take all that has been added."""
        return self.take(len(self.text) - self.place)

    def unread(self) -> str:
        return self.text[self.place :]

    def take_spaces(self) -> None:
        """Take the white space that has been added, without waiting for more."""
        match = _SPACES.match(self.text, self.place)
        if match is not None:
            self.take(len(match.group()))

    def follows(self, text: str) -> Reading[bool]:
        """Return whether `text` comes next. Waits only while what has been added may become it."""
        while True:
            following = self.text[self.place : self.place + len(text)]
            if following == text or not text.startswith(following):
                return following == text
            yield from self.more()

    def more(self) -> Reading[None]:
        """Wait for more text. Raises EndOfText."""
        if self.ended:
            raise EndOfText
        yield

    def ahead(self, count: int) -> Reading[str]:
        """Return the next `count` characters without reading them."""
        while len(self.text) - self.place < count:
            yield from self.more()
        return self.text[self.place : self.place + count]

    def run(self, pattern: re.Pattern[str], out: Out) -> Reading[None]:
        """Read characters while they match a pattern such as `[a-z]+`. Returns when another one follows."""
        while True:
            match = pattern.match(self.text, self.place)
            if match is not None:
                out(self.take(match.end() - self.place))
            if self.place < len(self.text):
                return
            yield from self.more()

    def word(self, pattern: re.Pattern[str]) -> Reading[str]:
        parts: list[str] = []
        yield from self.run(pattern, parts.append)
        return "".join(parts)

    def spaces(self) -> Reading[str]:
        return (yield from self.word(_SPACES))

    def symbol(self) -> Reading[str]:
        """Read white space. Return the next character without reading it."""
        yield from self.spaces()
        return (yield from self.ahead(1))

    def literal(self, text: str) -> Reading[bool]:
        """Read `text` if it comes next."""
        if not (yield from self.follows(text)):
            return False
        self.take(len(text))
        return True

    def accept(self, text: str) -> Reading[bool]:
        """Read white space and then `text` if it comes next."""
        yield from self.spaces()
        return (yield from self.literal(text))

    def expect(self, text: str) -> Reading[None]:
        if not (yield from self.accept(text)):
            raise Mismatch(text)

    def until(self, targets: Targets, out: Out) -> Reading[str]:
        """Read up to and with the first of some texts. Return it. Holds back only what may begin one."""
        while True:
            match = targets.search(self.text, self.place)
            if match is not None:
                out(self.take(match.start() - self.place))
                return self.take(len(match.group()))
            out(self.take(targets.partial(self.text, self.place) - self.place))
            yield from self.more()


def escape(text: str) -> str:
    """Return text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
