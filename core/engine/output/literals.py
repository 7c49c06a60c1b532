"""Read values as models write them, and pass them on as JSON text while they arrive."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from core.engine.interface import Piece
from core.engine.output.source import SPACE, EndOfText, Mismatch, Out, Reading, Source, Targets, escape

# Deeper values are no arguments: JSON readers refuse them.
MAX_DEPTH = 128

_CONTAINERS = {"{": ("}", "{", "}"), "[": ("]", "[", "]"), "(": (")", "[", "]")}  # opener: its closer, and in JSON
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LONGEST_NUMBER = 400  # no float has as many digits, and readers refuse integers of thousands

_WORD = re.compile(r"[A-Za-z0-9_+.\-]+")
_BARE_KEY = re.compile(r"[^\s:,{}\[\]\"\ud800-\udfff]+")
_CHARACTERS = re.compile(r"[^\"'\\\x00-\x1f\ud800-\udfff]+")
_ESCAPES = {char: "\\" + char for char in '"\\/bfnrt'} | {"'": "'"}
_PYTHON_ESCAPES = {"a": "\\u0007", "v": "\\u000b", "0": "\\u0000", "\n": ""}
_HEX_ESCAPES = {"u": 4}
_PYTHON_HEX_ESCAPES = {"u": 4, "x": 2, "U": 8}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How values are written. `quotes` encloses a string of the dialect "braces"."""

    name: Literal["json", "python", "braces"]
    quotes: Targets = Targets(())

    @property
    def quote(self) -> str:
        return self.quotes.texts[0] if self.quotes.texts else ""


JSON = Dialect("json")
PYTHON = Dialect("python")


def value(source: Source, dialect: Dialect, out: Out) -> Reading[None]:
    """Read one value. It may be nested: what is open is on a list, not on Python's stack."""
    closers: list[tuple[str, str]] = []  # of the open containers: as written, and in JSON
    while True:
        # 1) A value begins: a scalar, which is read, or a container, which is opened.
        char = yield from source.symbol()
        container = _CONTAINERS.get(char) if char != "(" or dialect is PYTHON else None
        if container is not None:
            if len(closers) == MAX_DEPTH:
                raise Mismatch
            source.take(1)
            closers.append((container[0], container[2]))
            out(container[1])
        else:
            yield from scalar(source, dialect, out)
        opened = container is not None
        # 2) Then come closers, until a comma or an opened container says that another value follows.
        while closers:
            closer, json_closer = closers[-1]
            ends = yield from source.accept(closer)
            if not ends and not opened:
                yield from source.expect(",")
                ends = yield from source.accept(closer)  # a comma at the end
            if ends:
                out(json_closer)
                closers.pop()
                opened = False
                continue
            # 3) Another value follows: pass the comma on, and a key.
            if not opened:
                out(", ")
            if json_closer == "}":
                yield from _key(source, dialect, out)
                yield from source.expect(":")
                out(": ")
            break
        else:
            return


def scalar(source: Source, dialect: Dialect, out: Out) -> Reading[None]:
    """Read a string, a number, true, false or null."""
    char = yield from source.symbol()
    if (yield from _string(source, dialect, out)):
        return
    if not _WORD.match(char):
        raise Mismatch
    word = yield from source.word(_WORD)
    json_text = _json_scalar(word)
    if json_text is None:
        source.put_back(word)
        raise Mismatch(word)
    out(json_text)


def string(source: Source, out: Out, *, python: bool = False) -> Reading[None]:
    """Read a string in quotes. What JSON does not allow in one is escaped."""
    quote = yield from source.symbol()
    if quote != '"' and not (python and quote == "'"):
        raise Mismatch
    source.take(1)
    out('"')
    while True:
        yield from source.run(_CHARACTERS, out)
        char = yield from source.ahead(1)
        if char == "\\":
            yield from _escape_sequence(source, out, python=python)
            continue
        source.take(1)
        if char == quote:
            out('"')
            return
        out(escape(source.plain(char)))


def text_of(json_string: str) -> str:
    """Return the text of a JSON string that `string` has passed on."""
    return str(json.loads(json_string))


def literal_of(text: str) -> str | None:
    """Return a complete value, written as JSON or Python, as JSON text. None if it is no such value."""
    source = Source(())
    source.add(Piece(text + "\n"))
    source.ended = True
    parts: list[str] = []
    try:
        for _ in value(source, PYTHON, parts.append):
            pass
    except (Mismatch, EndOfText):
        return None
    return None if source.unread().strip(SPACE) else "".join(parts)


def _key(source: Source, dialect: Dialect, out: Out) -> Reading[None]:
    yield from source.symbol()
    if (yield from _string(source, dialect, out)):
        return
    key = (yield from source.word(_BARE_KEY)) if dialect.name == "braces" else ""
    if not key:
        raise Mismatch
    out(json.dumps(key, ensure_ascii=False))


def _string(source: Source, dialect: Dialect, out: Out) -> Reading[bool]:
    """Read a string if one comes next."""
    if dialect.quote and (yield from source.literal(dialect.quote)):
        out('"')
        yield from source.until(dialect.quotes, lambda text: out(escape(source.plain(text))))
        out('"')
        return True
    char = yield from source.ahead(1)
    if char == '"' or (char == "'" and dialect is PYTHON):
        yield from string(source, out, python=dialect is PYTHON)
        return True
    return False


def _escape_sequence(source: Source, out: Out, *, python: bool) -> Reading[None]:
    """Read a backslash and what it escapes. A backslash that escapes nothing stands for itself."""
    char = (yield from source.ahead(2))[1]
    digits = (_PYTHON_HEX_ESCAPES if python else _HEX_ESCAPES).get(char)
    if digits is not None:
        code = ""
        while len(code) < digits:
            following = (yield from source.ahead(3 + len(code)))[-1]
            if following not in "0123456789abcdefABCDEF":
                break
            code += following
        if len(code) == digits and int(code, 16) <= 0x10FFFF:
            source.take(2 + digits)
            out(f"\\u{code.zfill(4)}" if digits <= 4 else json.dumps(chr(int(code, 16)))[1:-1])
            return
    known = _ESCAPES.get(char)
    if known is None and python:
        known = _PYTHON_ESCAPES.get(char)
    source.take(1 if known is None else 2)
    out("\\\\" if known is None else known)


def _json_scalar(word: str) -> str | None:
    if word in _WORDS:
        return _WORDS[word]
    if len(word) > _LONGEST_NUMBER:
        return None
    if _JSON_NUMBER.fullmatch(word):
        return word
    for number in _NUMBERS if re.match(r"[-+.0-9]", word) else ():
        try:
            read = number(word)
        except ValueError:
            continue
        return repr(read) if isinstance(read, int) or math.isfinite(read) else None
    return None


_NUMBERS: tuple[Callable[[str], int | float], ...] = (lambda word: int(word, 0), float)
