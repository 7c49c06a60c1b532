"""Budget: what one rendering of a foreign chat template may use: steps, characters, list items, seconds. Knows no
Jinja."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

STEPS = 200_000  # besides those for the input
LONGEST = 1 << 24  # most characters of one string
SECONDS = 5.0
DEPTH = 100  # most containers within each other


class Refused(Exception):
    """The template called `raise_exception`. Its words are about the messages it was given."""


class Runaway(Exception):
    """The template went over its budget."""


class Broken(Exception):
    """The template cannot be compiled, or failed as no template should."""


class Budget:
    """Raises Runaway when it is used up."""

    steps: int
    characters: int
    items: int

    def __init__(self, variables: Mapping[str, Any]) -> None:
        """Grows with the input: a template may look at each message some hundred times, but not without end."""
        size = _Size()
        size.measure(variables)
        self.steps = STEPS + 200 * size.steps
        self.characters = (1 << 26) + 64 * size.characters
        self.items = (1 << 20) + 16 * size.steps + 4 * size.characters
        self.ends = time.monotonic() + SECONDS

    def take(self, characters: int = 0, steps: int = 1) -> None:
        self.steps -= steps
        self.characters -= characters
        if characters > LONGEST:
            raise Runaway(f"makes a string of more than {LONGEST} characters")
        if self.steps < 0 or self.characters < 0:
            raise Runaway("takes too many steps" if self.steps < 0 else "handles too much text")
        if time.monotonic() > self.ends:
            raise Runaway(f"takes more than {SECONDS:g} seconds")

    def take_items(self, count: int) -> None:
        """For a list: an item is 8 bytes and up to 64 for a value of its own."""
        self.items -= count
        if self.items < 0:
            raise Runaway("makes lists of too many items")
        self.take()

    def measure(self, value: Any, depth: int = 0) -> None:
        """Take what the text of `value` will need. Values may hold each other, so that can be exponential."""
        if depth > DEPTH:
            raise Runaway("nests values too deeply")
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                self.measure(key, depth + 1)
                self.measure(inner, depth + 1)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                self.measure(inner, depth + 1)
        else:
            self.take(20)


class _Size(Budget):
    """Counts instead of taking."""

    def __init__(self) -> None:
        self.steps = self.characters = 0

    def take(self, characters: int = 0, steps: int = 1) -> None:
        self.steps += steps
        self.characters += characters


current: ContextVar[Budget | None] = ContextVar("budget", default=None)


def take(characters: int = 0, steps: int = 1) -> None:
    if (budget := current.get()) is not None:
        budget.take(characters, steps)


def take_items(count: int) -> None:
    if (budget := current.get()) is not None:
        budget.take_items(count)


def measure(value: Any) -> Any:
    """`value` itself, once the budget has room for its text."""
    if (budget := current.get()) is not None:
        budget.measure(value)
    return value
