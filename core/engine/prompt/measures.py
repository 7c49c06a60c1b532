"""Measures: what filters, tests and operators of a chat template are about to make, taken from its budget before it is
made. Knows no Jinja."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from core.engine.prompt.budget import Runaway, measure, take, take_items

WIDE = re.compile(r"\d{4}|\*|:[^{}]*\{")  # a field width that is long, or taken from an argument

_STRINGIFY = frozenset(
    (
        *("capitalize", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string", "striptags"),
        *("title", "trim", "truncate", "upper", "urlencode", "wordcount"),
    )
)
_LISTING = frozenset(("dictsort", "groupby", "join", "list", "reverse", "sort", "unique"))
_COMPARING = frozenset(("dictsort", "groupby", "max", "min", "sort", "unique"))
_INTEGER_BITS = 4096
_DIGITS = 20  # most that `round` may be asked for: it computes 10 to their power


def compared(value: Any) -> Any:
    """Lists that hold each other are compared in exponential time; a string in less than it took to make."""
    return measure(value) if isinstance(value, list | tuple | Mapping) else value


def check_integer(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise Runaway(f"computes a number of more than {_INTEGER_BITS} bits")


def _listed(value: Any) -> Any:
    """An iterable whose items are counted before or while they become a list."""
    if hasattr(value, "__len__"):
        take_items(len(value))
        return value
    return _taken(value) if hasattr(value, "__iter__") else value


def _taken(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        take_items(1)
        yield item


def check_growth(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure what `replace`, `indent` and the ways to split are about to make of `text`."""
    given = (*args, *kwargs.values())
    if name in ("split", "rsplit"):
        by = given[0] if given else None
        take_items(text.count(by) + 1 if isinstance(by, str) and by else len(text) // 2 + 1)
    elif name == "splitlines":
        take_items(len(text) + 1 if len(text) < 1000 else len(text.splitlines()))
    elif name in ("replace", "indent"):
        measure(given)
    if name == "replace" and len(given) >= 2:
        old, new = str(given[0]), str(given[1])
        take(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name == "indent":
        width = given[0] if given else 4
        take(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))


def guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured: what it turns into text, and what comes of it."""
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
    """`round` computes 10 to the power of `precision`."""
    if not isinstance(precision, int) or abs(precision) > _DIGITS:
        raise Runaway(f"rounds to more than {_DIGITS} digits")


def guarded_test(function: Any) -> Callable[..., Any]:
    """A test that compares (`is eq`, `is in`), whose operands are measured as those of a comparison."""

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
