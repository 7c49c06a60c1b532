"""Keep a client's strings from becoming control tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from core.engine.interface import Engine


class Guard:
    """Marks the names of control tokens in a client's strings, and cuts them in two in the template's output.

    The mark is in front of the name, so a template that looks for a name ("</think>" in an assistant's message) still
    finds it. It consists of digits, which neither `upper` nor `tojson` changes. A template may drop marked text.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mark = f"{int.from_bytes(os.urandom(8), 'big'):020}"
        self.count = 0  # marks so far

    def mark(self, value: Any) -> Any:
        """Return the value with a mark in front of each name in its strings, including keys of objects."""
        if isinstance(value, str):
            starts = self._engine.control_names(value)
            if not starts:
                return value
            self.count += len(starts)
            ends = [*starts[1:], len(value)]
            named = (value[start:end] for start, end in zip(starts, ends, strict=True))
            return self._mark.join((value[: starts[0]], *named))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        return [self.mark(inner) for inner in value] if isinstance(value, list | tuple) else value

    def is_marked(self, text: str, place: int) -> bool:
        """Return whether the name at `place` in the template's output comes from the client."""
        return text.endswith(self._mark, 0, place)

    def parts(self, text: str) -> Iterator[str]:
        """Return the text without marks, in parts that cut each marked name in two."""
        part, *named = text.split(self._mark)
        for name in named:
            yield part + name[:1]
            part = name[1:]
        yield part


def strings(value: Any) -> Iterator[str]:
    """Yield all strings in a value, including keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
