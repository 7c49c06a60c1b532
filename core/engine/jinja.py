"""Jinja: runs a chat template that somebody else wrote. Knows nothing of models or messages.

A template comes with a downloaded model, so it is foreign code. Jinja's immutable sandbox keeps it away from Python's
internals but lets it loop and grow strings without end. Here every loop, call, operator and output draws on a budget,
and what makes long strings from short ones is measured before it is done.

Otherwise templates run as in transformers: trim_blocks, lstrip_blocks, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`; `{% generation %}` is ignored. Import this module when a template is needed, not
before: jinja2 takes 0.18 s.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.engine import budget
from core.engine.budget import Broken, Budget, Refused, Runaway, measure, take

SOURCE = 1 << 18  # most characters of a template; the longest known to us has 20,000

_COUNTED, _JOINED = "counted iterable", "joined operands"  # filters that no template can name: they hold a space
_FILTERS = frozenset(
    (
        *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
        *("forceescape", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
        *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort"),
        *("string", "striptags", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"),
    )
)
_STRINGIFY = frozenset(("e", "escape", "forceescape", "indent", "replace", "string", "truncate", "urlencode"))
_LONG_STRING_METHODS = frozenset(("center", "expandtabs", "ljust", "rjust", "translate", "zfill"))
_WIDE = re.compile(r"\d{4}|\*|:[^{}]*\{")  # a field width that is long, or taken from an argument
_INTEGER_BITS = 4096


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The template's output. Blocks for at most about `budget.SECONDS`; call it in a worker thread.

    Raises Refused, Runaway or Broken.
    """
    template = compiled(source)
    try:
        token = budget.current.set(Budget(variables))
        try:
            return template.render(variables)
        finally:
            budget.current.reset(token)
    except (Refused, Runaway):
        raise
    except Exception as error:  # foreign code: it may raise anything
        raise Broken(f"{type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """Raises Broken if it cannot be compiled."""
    if len(source) > SOURCE:
        raise Broken(f"it has {len(source)} characters; the most is {SOURCE}")
    environment = _environment()
    try:
        tree = environment.parse(source)
        _bound(tree, environment)
        code = environment.compile(tree)
    except Exception as error:  # Jinja's errors, and RecursionError, MemoryError, SyntaxError of Python's
        raise Broken(f"{type(error).__name__}: {error}") from error
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _bound(tree: nodes.Template, environment: Environment) -> None:
    """Make every loop count its rounds, weighed by the text they put out, and every `~` measure its operands."""
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise Broken("recursive loops are not supported")
        weight = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        loop.iter = nodes.Filter(loop.iter, _COUNTED, [nodes.Const(weight)], [], None, None)
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [nodes.Filter(nodes.List(joined.nodes), _JOINED, [], [], None, None)]
    tree.set_environment(environment)


def _counted(iterable: Iterable[Any], weight: int) -> Iterator[Any]:
    for item in iterable:
        take(weight)
        yield item


def _joined(values: list[Any]) -> str:
    return "".join(map(str, measure(values)))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= int(indent) <= 16:
        raise Runaway("indents JSON by more than 16")
    if separators is not None and max(map(len, separators)) > 16:
        raise Runaway("separates JSON by more than 16 characters")
    return json.dumps(
        measure(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise Refused(str(message)[:300])


def _strftime_now(form: Any) -> str:
    form = str(form)
    if len(form) > 100 or re.search(r"\d{3}", form):
        raise Runaway("asks for a date that is too long")
    return datetime.now().astimezone().strftime(form)


def _check_growth(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure what `replace`, `join` and `indent` are about to make of `text`."""
    given = (*args, *kwargs.values())
    if name == "replace" and len(given) >= 2:
        old, new = str(given[0]), str(given[1])
        take(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name == "indent":
        width = given[0] if given else 4
        take(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured: what it turns into text, and what comes of it."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context may be passed before the value

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        take()
        value, rest = args[first], args[first + 1 :]
        if name == "join":
            value = list(value)
            separator = str(rest[0] if rest else kwargs.get("d", ""))
            take(len(separator) * len(value))
            args = (*args[:first], value, *rest)
        if name == "join" or name in _STRINGIFY:
            measure(value)
        if isinstance(value, str):
            _check_growth(value, name, rest, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            take(len(result), 0)
        return result

    return guarded


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Measure what `+`, `*`, `**` and `%` are about to make."""
    take()
    if operator == "%" and isinstance(left, str):
        if _WIDE.search(left):
            raise Runaway("formats with a wide field")
        measure((left, right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(1, abs(right)) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _INTEGER_BITS:
            raise Runaway(f"computes a number of more than {_INTEGER_BITS} bits")
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        take(len(left) + len(right))
    elif operator == "*":
        for times, repeated in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(repeated, "__len__"):
                take(max(0, times) * len(repeated))


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        take()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (measure(list(args[0])), *args[1:])
                take(len(owner) * len(args[0]))
            _check_growth(owner, name, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            take(len(result), 0)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _LONG_STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def form(*args: Any, **kwargs: Any) -> str:
            if _WIDE.search(value.__self__):
                raise SecurityError("format with a wide field")
            measure((args, kwargs))
            return wrapped(*args, **kwargs)

        return form


class _Generation(Extension):
    """transformers marks the assistant's words for training with this block."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = _Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants must not be folded outside of the budget
        finalize=measure,
        cache_size=0,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters = {name: _guarded(name, environment.filters[name]) for name in _FILTERS}
    environment.filters |= {_COUNTED: _counted, _JOINED: _joined, "tojson": _tojson}
    environment.globals.pop("lipsum")
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment
