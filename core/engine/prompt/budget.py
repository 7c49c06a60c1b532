"""Limit what one rendering of an untrusted chat template may use: steps, characters, list items, seconds. No Jinja.

`Budget` counts. The functions below it measure what filters, tests and operators are about to make, before they do.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

STEPS = 200_000  # in addition to those for the input
LONGEST = 1 << 24  # most characters of one string
SECONDS = 5.0
DEPTH = 100  # most nested containers


class Refused(Exception):
    """The template called `raise_exception`. The message describes what is wrong with the messages."""


class Runaway(Exception):
    """The template exceeded its budget."""


class Broken(Exception):
    """The template cannot be compiled, or raised an exception."""


class Budget:
    """Raises Runaway when it is used up."""

    steps: int
    characters: int
    items: int

    def __init__(self, variables: Mapping[str, Any], *, steps: int = STEPS, seconds: float = SECONDS) -> None:
        """Add to the budget for the size of `variables`: a template may look at each message some hundred times."""
        size = _Size()
        size.measure(variables)
        self.steps = steps + 200 * size.steps
        self.characters = (1 << 26) + 64 * size.characters
        self.items = (1 << 20) + 16 * size.steps + 4 * size.characters
        self.seconds = seconds
        self.ends = time.monotonic() + seconds

    def take(self, characters: int = 0, steps: int = 1) -> None:
        self.steps -= steps
        self.characters -= characters
        if characters > LONGEST:
            raise Runaway(f"makes a string of more than {LONGEST} characters")
        if self.steps < 0 or self.characters < 0:
            raise Runaway("takes too many steps" if self.steps < 0 else "handles too much text")
        if time.monotonic() > self.ends:
            raise Runaway(f"takes more than {self.seconds:g} seconds")

    def take_items(self, count: int) -> None:
        """Take `count` list items. An item takes 8 bytes, and up to 64 for its value."""
        self.items -= count
        if self.items < 0:
            raise Runaway("makes lists of too many items")
        self.take()

    def measure(self, value: Any, depth: int = 0) -> None:
        """Take what the text of `value` needs. Values may contain each other, so the text can be exponentially long."""
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
    """Measures the size of the input instead of taking from a budget."""

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
    """Take what the text of `value` needs, and return `value`."""
    if (budget := current.get()) is not None:
        budget.measure(value)
    return value


WIDE = re.compile(r"\d{4}|\*|:[^{}]*\{")  # a field width of four digits, or one from an argument

_STRINGIFY = frozenset(
    (
        *("capitalize", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string", "striptags"),
        *("title", "trim", "truncate", "upper", "urlencode", "wordcount"),
    )
)
_LISTING = frozenset(("dictsort", "groupby", "join", "list", "reverse", "sort", "unique"))
_COMPARING = frozenset(("dictsort", "groupby", "max", "min", "sort", "unique"))
_INTEGER_BITS = 4096
_DIGITS = 20  # most digits for `round`, which computes 10 to their power


def compared(value: Any) -> Any:
    """Measure an operand of a comparison.

    Comparing lists that contain each other takes exponential time. Comparing a string takes less than making it.
    """
    return measure(value) if isinstance(value, list | tuple | Mapping) else value


def check_integer(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise Runaway(f"computes a number of more than {_INTEGER_BITS} bits")


def _listed(value: Any) -> Any:
    """Return an iterable whose items are counted before, or while, it becomes a list."""
    if hasattr(value, "__len__"):
        take_items(len(value))
        return value
    return _taken(value) if hasattr(value, "__iter__") else value


def _taken(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        take_items(1)
        yield item


def check_growth(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure what `replace`, `indent`, `split` and the like are about to make from `text`."""
    arguments = (*args, *kwargs.values())
    if name in ("split", "rsplit"):
        by = arguments[0] if arguments else None
        take_items(text.count(by) + 1 if isinstance(by, str) and by else len(text) // 2 + 1)
    elif name == "splitlines":
        take_items(len(text) + 1 if len(text) < 1000 else len(text.splitlines()))
    elif name in ("replace", "indent"):
        measure(arguments)
    if name == "replace" and len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        take(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name == "indent":
        width = arguments[0] if arguments else 4
        take(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))


def guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter, to measure its input and its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context may be passed before the value

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        take()
        value, rest = args[first], args[first + 1 :]
        if name in _LISTING:
            value = _listed(value)
            args = (*args[:first], value, *rest)
        if name == "round":
            _check_round(value, *rest, **kwargs)
        if name == "join":
            measure((rest, kwargs))
            value = list(value)
            separator = str(rest[0] if rest else kwargs.get("d", ""))
            take(len(separator) * len(value))
            args = (*args[:first], value, *rest)
        if name == "join" or name in _STRINGIFY or name in _COMPARING:
            measure(value)
        if isinstance(value, str):
            check_growth(value, name, rest, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            take(len(result), 0)
        check_integer(result)
        return result

    return guarded


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    """Limit `precision`: `round` computes 10 to its power."""
    if not isinstance(precision, int) or abs(precision) > _DIGITS:
        raise Runaway(f"rounds to more than {_DIGITS} digits")


def guarded_test(function: Any) -> Callable[..., Any]:
    """Wrap a test that compares (`is eq`, `is in`), to measure its operands."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        take()
        for value in (*args, *kwargs.values()):
            compared(value)
        return function(*args, **kwargs)

    return guarded


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Measure what an operator is about to make."""
    take()
    if operator == "%" and isinstance(left, str):
        if WIDE.search(left):
            raise Runaway("formats with a wide field")
        measure((left, right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(1, abs(right)) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _INTEGER_BITS:
            raise Runaway(f"computes a number of more than {_INTEGER_BITS} bits")
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        if isinstance(left, str):
            take(len(left) + len(right))
        else:
            take_items(len(left) + len(right))
    elif operator == "*":
        for times, repeated in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(repeated, "__len__"):
                (take if isinstance(repeated, str) else take_items)(max(0, times) * len(repeated))
