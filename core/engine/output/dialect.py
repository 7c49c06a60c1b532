"""Find how a model writes: its family, and which of the family's markers are tokens of its vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from core.engine.interface import Engine
from core.engine.output.families import Family, Think, family_of, marker_texts


@dataclass(frozen=True, slots=True)
class Markers:
    """The family's markers that are single tokens of the vocabulary. `ends` are those that end an answer."""

    tokens: tuple[tuple[str, int], ...] = ()
    ends: frozenset[str] = frozenset()


NO_MARKERS = Markers()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model writes: its family, which of the family's markers are tokens, and its reasoning if it has any."""

    family: Family
    markers: Markers
    think: Think | None

    @property
    def texts(self) -> frozenset[str]:
        """The texts of the markers that are tokens."""
        return frozenset(text for text, _ in self.markers.tokens)


_dialects: WeakKeyDictionary[Engine, Dialect] = WeakKeyDictionary()
_lock = threading.Lock()


def dialect_of(engine: Engine) -> Dialect:
    """Return a model's dialect. Blocks: the first call for a model may read its control names."""
    with _lock:
        dialect = _dialects.get(engine)
    if dialect is None:
        dialect = _read_dialect(engine)
        with _lock:
            _dialects[engine] = dialect
    return dialect


def _read_dialect(engine: Engine) -> Dialect:
    template = engine.card.chat_template or ""

    def token_of(text: str) -> int | None:
        """Return the token of which `text` is the name."""
        if engine.control_names(text)[:1] != [0]:
            return None
        tokens = engine.tokenize(text, special=True, continued=True)
        return tokens[0] if len(tokens) == 1 else None

    family = family_of(engine.card.chat_template, lambda text: token_of(text) is not None)
    tokens = {text: token for text in marker_texts(family) if (token := token_of(text)) is not None}
    ends = frozenset(text for text, token in tokens.items() if engine.is_end(token))
    think = family.think if _thinks(family, tokens, template) else None
    return Dialect(family, Markers(tuple(tokens.items()), ends), think)


def _thinks(family: Family, tokens: Collection[str], template: str) -> bool:
    """Return whether the model may reason: its template or its vocabulary has the family's markers of reasoning."""
    if family.channels:
        return True
    opener, closer = family.think.opener.split("\n")[0], family.think.closer
    return opener in template or closer in template or any(opener.startswith(text) for text in tokens)
