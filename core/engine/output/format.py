"""Say how the answer to one request is written and read: its grammar, its markers and its parser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from core.engine.grammar import json_schema
from core.engine.grammar import tools as grammars
from core.engine.grammar.tool_schema import Tool
from core.engine.interface import Engine, OutputFormat
from core.engine.output import parsers
from core.engine.output.dialect import Dialect
from core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request allows as its answer.

    `tools` may be called, as `mode` says. `schema` is that of a JSON answer. `field` is the name of the i-th tool's
    parameters in error messages, `schema_field` that of the schema. `reasoning_budget` is the most tokens of reasoning.
    """

    tools: Sequence[Tool] = ()
    mode: Literal["auto", "required"] = "auto"
    parallel: bool = True
    names: Iterable[str] | None = None
    schema: Mapping[str, Any] | None = None
    field: str = grammars.FIELD
    schema_field: str = "response_format"
    reasoning_budget: int | None = None


def plan(
    engine: Engine, dialect: Dialect, answer: Answer, *, reasoning_open: bool
) -> tuple[str | None, OutputFormat | None]:
    """Return the grammar of an answer and the format in which it is read. Blocks: it compiles the grammars.

    `reasoning_open`: the prompt ends inside reasoning. Raises InvalidRequest for a grammar that cannot be compiled.
    """
    family = dialect.family
    allowed = None if answer.names is None else frozenset(answer.names)
    tools = [tool for tool in answer.tools if allowed is None or tool.name in allowed]
    # 1) What holds from the first token, and what holds from the opener of a call on.
    grammar = _grammar(dialect, answer, tools)
    call_grammar = None
    if tools and grammar is None:
        call_grammar = grammars.call(
            family, answer.tools, parallel=answer.parallel, names=allowed, markers=dialect.markers, field=answer.field
        )
    for compiled, field in ((grammar, answer.schema_field if not tools else "tools"), (call_grammar, "tools")):
        if compiled is not None:
            _check(engine, compiled, field)
    # 2) How it is read.
    if not tools and dialect.think is None:
        return grammar, None
    closer = _closer(engine, dialect) if reasoning_open or answer.reasoning_budget is not None else ()
    return grammar, OutputFormat(
        parser=partial(parsers.parser, family, tools, dialect.texts, reasoning_open=reasoning_open),
        markers=dialect.texts,
        call_grammar=call_grammar,
        end_after_call=bool(tools) and not (answer.parallel and family.several),
        reasoning_budget=answer.reasoning_budget,
        closer=closer,
    )


def _grammar(dialect: Dialect, answer: Answer, tools: Sequence[Tool]) -> str | None:
    family, markers = dialect.family, dialect.markers
    names = None if answer.names is None else frozenset(answer.names)
    schema = None if answer.schema is None else dict(answer.schema)
    if tools and answer.mode == "required":
        return grammars.required(
            family, answer.tools, parallel=answer.parallel, names=names, markers=markers, field=answer.field
        )
    if schema is None:
        return None
    grammar = json_schema.grammar(schema, answer.schema_field)
    if tools:
        return grammars.either(
            family, answer.tools, schema, parallel=answer.parallel, names=names, markers=markers, field=answer.field
        )
    return grammars.answer(family, schema, markers=markers) if family.channels else grammar


def _check(engine: Engine, grammar: str, field: str) -> None:
    try:
        engine.check_grammar(grammar)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=field) from error


def _closer(engine: Engine, dialect: Dialect) -> tuple[int, ...]:
    """Return the tokens that end reasoning, with the white space that models write around "</think>"."""
    if dialect.think is None:
        return ()
    closer = dialect.think.closer
    text = f"\n{closer}\n\n" if closer == "</think>" else closer
    return tuple(engine.tokenize(text, special=True, continued=True))
