"""Compute how large a JSON Schema is once its references are followed.

A schema of 2 kB can have 2^40 subschemas, if each definition refers twice to the next one. A validator would visit them
one by one and never end, without letting other threads run. Here each subschema is weighed once, so the time is linear
in the length of the schema's text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

MAX_SUBSCHEMAS = 20_000  # a schema of 64 KiB without references has 9,000 at most
MAX_CHECKS = 1_000_000  # subschemas applied to values; jsonschema-rs does 30 million a second
_MAX_VISITS = 100_000  # pairs of a subschema and a value that `checks` looks at; 0.2 s

_IN_PLACE = ("allOf", "anyOf", "oneOf")
_LISTS = (*_IN_PLACE, "prefixItems")
_MAPS = ("properties", "patternProperties")
_SINGLE = ("additionalProperties", "items", "additionalItems")

Item = TypeVar("Item")


class Unresolvable(ValueError):
    """A reference that cannot be followed. The message says which one and why."""


class Expansion:
    """The size of one schema. Raises Unresolvable.

    `subschemas` is their number with every reference replaced by its target. A reference back to a subschema that
    contains it counts as one, and makes the schema `recursive`.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._anchors = _anchors(schema)
        self.subschemas, self.recursive = _weigh(schema, id, self._parts)

    def checks(self, data: Any) -> int:
        """Return an upper bound of how often a validator without memory applies a subschema to a value in `data`.

        A recursive schema with two alternatives has few subschemas, but its checks double with each level of `data`.
        """
        if not self.recursive and self.subschemas * _values(data) <= MAX_CHECKS:
            return self.subschemas * _values(data)
        visits = 0

        def below(pair: tuple[Any, Any]) -> list[tuple[Any, Any]]:
            nonlocal visits
            visits += 1
            if visits > _MAX_VISITS:
                raise OverflowError
            return list(self._applied(*pair))

        try:
            weight, _ = _weigh((self._schema, data), lambda pair: (id(pair[0]), id(pair[1])), below)
        except OverflowError:
            return MAX_CHECKS + 1
        return weight

    def _parts(self, schema: Any) -> list[Any]:
        return [inner for inner, _ in self._inside(schema)]

    def _inside(self, schema: Any) -> Iterator[tuple[Any, str]]:
        """Yield the subschemas of one schema, each with the keyword that applies it. Follows references."""
        if not isinstance(schema, dict):
            return
        if schema is not self._schema and _is_resource(schema):
            raise Unresolvable("'$id' is supported at the top of the schema only")
        for keyword, value in schema.items():
            if keyword == "$ref" and isinstance(value, str):
                yield self._resolve(value), keyword
            elif isinstance(value, list) and (keyword in _LISTS or keyword == "items"):
                yield from ((inner, keyword) for inner in value)
            elif isinstance(value, dict) and keyword in _MAPS:
                yield from ((inner, keyword) for inner in value.values())
            elif keyword in _SINGLE:
                yield value, keyword

    def _applied(self, schema: Any, data: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the pairs of subschema and value that `schema` applies to `data` and its members.

        Except for `properties`, every subschema for members is paired with every member. A validator does less.
        """
        for inner, keyword in self._inside(schema):
            if keyword == "$ref" or keyword in _IN_PLACE:
                yield inner, data
            elif keyword == "properties":
                continue
            elif isinstance(data, dict) and keyword in ("patternProperties", "additionalProperties"):
                yield from ((inner, member) for member in data.values())
            elif isinstance(data, list) and keyword in ("items", "prefixItems", "additionalItems"):
                yield from ((inner, member) for member in data)
        named = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(named, dict) and isinstance(data, dict):
            yield from ((named[name], member) for name, member in data.items() if name in named)

    def _resolve(self, reference: str) -> Any:
        fragment = unquote(reference[1:])
        if fragment and not fragment.startswith("/"):
            targets = self._anchors.get(fragment, [])
            if len(targets) != 1:
                raise Unresolvable(f"$ref to {reference[:100]}, of which the schema has {len(targets)}")
            return targets[0]
        place: Any = self._schema
        for step in fragment.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
                place = place[int(name)]
            elif isinstance(place, dict) and name in place:
                place = place[name]
            else:
                raise Unresolvable(f"$ref to {reference[:100]}, which does not exist")
            if _is_resource(place):
                raise Unresolvable("'$id' is supported at the top of the schema only")
        return place


def _is_resource(schema: Any) -> bool:
    """Return whether references below are relative to `schema`. In `properties`, "$id" may be a member's name."""
    return isinstance(schema, dict) and any(isinstance(schema.get(name), str) for name in ("$id", "id"))


def _anchors(schema: dict[str, Any]) -> dict[str, list[Any]]:
    """Return all objects with an `$anchor`, by its name."""
    anchors: dict[str, list[Any]] = {}
    for value in _walk(schema):
        if isinstance(value, dict) and isinstance(name := value.get("$anchor"), str):
            anchors.setdefault(name, []).append(value)
    return anchors


def _values(data: Any) -> int:
    return sum(1 for _ in _walk(data))


def _walk(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        yield inner
        if isinstance(inner, dict):
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def _weigh(start: Item, key: Callable[[Item], Hashable], below: Callable[[Item], list[Item]]) -> tuple[int, bool]:
    """Return the weight of `start`, and whether any item is below itself.

    The weight is one plus the weights of all items below, each counted as often as it is reached. The walk uses a stack
    of its own, because a chain of references may have 1,000 links.
    """
    weights: dict[Hashable, int] = {}
    expanded: dict[Hashable, list[Item]] = {}
    cyclic = False
    stack = [start]
    while stack:
        item = stack[-1]
        name = key(item)
        if name in weights:
            stack.pop()
        elif name not in expanded:
            # 1) The first visit: weigh everything below first, except for what is being weighed already.
            expanded[name] = below(item)
            stack += [inner for inner in expanded[name] if key(inner) not in weights and key(inner) not in expanded]
        else:
            # 2) The second visit: everything below is weighed, or refers back to an item that contains this one.
            names = [key(inner) for inner in expanded[name]]
            cyclic = cyclic or any(inner not in weights for inner in names)
            weights[name] = 1 + sum(weights.get(inner, 1) for inner in names)
            stack.pop()
    return weights[key(start)], cyclic
