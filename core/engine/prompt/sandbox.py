"""Render an untrusted chat template with Jinja, within a budget.

A template comes with a downloaded model, so it is untrusted code. Jinja's immutable sandbox hides Python's internals
from it, but lets it loop and grow strings without end. Here every loop, call, operator and output takes from a
budget. Operations that make long strings or lists from short ones are measured before they run. Compilation has a
budget, too, and folds no constants.

Otherwise templates run as in transformers: trim_blocks, lstrip_blocks, loop controls, `tojson` without HTML escapes,
`raise_exception` and `strftime_now`. `{% generation %}` is ignored. Import this module only when a template is needed:
jinja2 takes 0.18 s.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SOURCE = 1 << 18  # most characters of a template; the longest that we know has 20,000
STEPS = 200_000  # in addition to those for the input
LONGEST = 1 << 24  # most characters of one string
SECONDS = 5.0
DEPTH = 100  # most nested containers

# Names of internal filters. They contain a space, so no template can use them.
_COUNTED, _JOINED, _MADE, _COMPARED = "counted iterable", "joined operands", "made here", "compared operand"
_FILTERS = frozenset(
    (
        *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
        *("forceescape", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
        *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort"),
        *("string", "striptags", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"),
    )
)
_COMPARISONS = (
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in"),
)
_LONG_STRING_METHODS = frozenset(("center", "encode", "expandtabs", "ljust", "rjust", "translate", "zfill"))


class Refused(Exception):
    """The template called `raise_exception`. The message describes what is wrong with the messages."""


class Runaway(Exception):
    """The template exceeded its budget."""


class Broken(Exception):
    """The template cannot be compiled, or raised an exception."""


def render(source: str, variables: Mapping[str, Any], *, steps: int = STEPS, seconds: float = SECONDS) -> str:
    """Return the template's output. Call it in a worker thread: it blocks, at most for about `seconds`.

    Raises Refused, Runaway or Broken.
    """
    template = compiled(source)
    try:
        token = current.set(Budget(variables, steps=steps, seconds=seconds))
        try:
            return template.render(variables)
        finally:
            current.reset(token)
    except (Refused, Runaway):
        raise
    except Exception as error:  # untrusted code may raise anything
        raise Broken(f"{type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """Compile a template within a budget of its own. Raises Broken."""
    if len(source) > SOURCE:
        raise Broken(f"it has {len(source)} characters; at most {SOURCE} are allowed")
    environment = _environment()
    token = current.set(Budget({}))
    try:
        tree = environment.parse(source)
        _bound(tree, environment)
        code = environment.compile(tree)
    except Exception as error:  # Jinja's errors, and RecursionError, MemoryError, SyntaxError of Python's
        raise Broken(f"{type(error).__name__}: {error}") from error
    finally:
        current.reset(token)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _bound(tree: nodes.Template, environment: Environment) -> None:
    """Add the budget to a template's syntax tree, where Jinja's sandbox has no hook."""
    # 1) Constants must not be huge.
    for constant in tree.find_all(nodes.Const):
        check_integer(constant.value)
    # 2) Charge each loop iteration, weighted by its literal text.
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise Broken("recursive loops are not supported")
        weight = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        loop.iter = nodes.Filter(loop.iter, _COUNTED, [nodes.Const(weight)], [], None, None)
    # 3) Measure the operands of `~`.
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [nodes.Filter(nodes.List(joined.nodes), _JOINED, [], [], None, None)]
    # 4) Count the items of slices and literals, and measure the operands of comparisons.
    _Wrapping().visit(tree)
    tree.set_environment(environment)


class _Wrapping(NodeTransformer):
    """Wraps in a filter what Jinja compiles to plain Python: slices, lists, tuples, comparisons."""

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._wrapped(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._wrapped(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._wrapped(node, _MADE) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._wrapped(node.expr, _COMPARED)
        for operand in node.ops:
            operand.expr = self._wrapped(operand.expr, _COMPARED)
        return node

    @staticmethod
    def _wrapped(node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None)


def _made(value: Any) -> Any:
    """Count the items of a slice or a literal. A tuple is measured, because hashing it visits all of its contents."""
    if isinstance(value, str):
        take(len(value))
    elif isinstance(value, list | tuple):
        take_items(len(value))
        if isinstance(value, tuple):
            measure(value)
    return value


@pass_context
def _put_out(context: Any, value: Any) -> Any:
    """Measure output: Jinja's `finalize`. Because it takes the context, the compiler cannot fold constant output."""
    return measure(value)


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
        raise Runaway("indents JSON by more than 16 spaces")
    if separators is not None and max(map(len, separators)) > 16:
        raise Runaway("separates JSON by more than 16 characters")
    return json.dumps(
        measure(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise Refused(str(measure(message))[:300])


def _strftime_now(form: Any) -> str:
    form = str(measure(form))
    if len(form) > 100 or re.search(r"\d{3}", form):
        raise Runaway("asks for a date that is too long")
    return datetime.now().astimezone().strftime(form)


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    intercepted_unops = frozenset(("+", "-"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:
        take()
        return super().call_unop(context, operator, arg)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        take()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (measure(list(args[0])), *args[1:])
                take(len(owner) * len(args[0]))
            check_growth(owner, name, args, kwargs)
        elif isinstance(owner, list | tuple):
            measure((owner, args))  # `index` and `count` compare items
        take_items(len(args))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            take(len(result), 0)
        elif isinstance(result, list | tuple | dict):
            take_items(len(result))
        check_integer(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _LONG_STRING_METHODS:
            return False
        if isinstance(obj, int | float | bytes | bytearray):  # `to_bytes` makes as many bytes as its argument says
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def form(*args: Any, **kwargs: Any) -> str:
            if WIDE.search(value.__self__):
                raise SecurityError("format with a wide field")
            measure((args, kwargs))
            return wrapped(*args, **kwargs)

        return form


class _Generation(Extension):
    """The block with which transformers marks the assistant's text for training. Its tags are ignored."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = _Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants must not be folded outside the budget
        finalize=_put_out,
        cache_size=0,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters = {name: guarded_filter(name, environment.filters[name]) for name in _FILTERS}
    environment.filters |= {_COUNTED: _counted, _JOINED: _joined, _MADE: _made, _COMPARED: compared, "tojson": _tojson}
    environment.tests |= {name: guarded_test(environment.tests[name]) for name in _COMPARISONS}
    environment.globals.pop("lipsum")
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


# The budget. `Budget` counts; the functions below it measure what an operation is about to make, before it does.


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
