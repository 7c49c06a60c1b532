"""Build grammars of tool calls in a family's form, for llguidance.

`required` holds from the first token of an answer, `call` from the end of an opener that the model wrote by itself,
`either` allows calls or a JSON answer. Each tool is an alternative of its own, with its own schema. A marker that is
one token of the vocabulary stands in the grammar as that token; text that spells it is something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from core.engine.grammar import json_schema, tool_schema
from core.engine.grammar.tool_schema import Member, Tool, Words
from core.engine.output.dialect import NO_MARKERS, Markers
from core.engine.output.families import Family, Form
from core.errors import InvalidRequest

FIELD = "tools[{}].function.parameters"

_KEY = {
    "tagged": re.compile(r"[^>\n]+"),
    "python": re.compile(r"[^\W\d]\w*"),
    "braces": re.compile(r"[^\s{}\[\]:,=<>\"'()|]+"),
}

_FINAL = "<|channel|>final<|message|>"  # harmony's header of an answer


class _Rule(str):
    """A piece of grammar, where a plain `str` is text of the call."""


class _Marker(str):
    """Text of the family: names of tokens in it are those tokens."""


def required(
    family: Family,
    tools: Sequence[Tool],
    *,
    parallel: bool = True,
    names: Iterable[str] | None = None,
    markers: Markers = NO_MARKERS,
    field: str = FIELD,
) -> str:
    """Return the grammar of an answer that is one call, or with `parallel` one or several.

    `names` narrows the tools that may be called. `field` is the name of the i-th tool's parameters in error messages.
    Blocks, about 2 ms for a tool that was not seen before. Raises InvalidRequest (see `tool_schema.arguments`).
    """
    grammar = _Grammar(family, tools, names, markers, field)
    return grammar.text(grammar.calls(parallel))


def call(
    family: Family,
    tools: Sequence[Tool],
    *,
    parallel: bool = True,
    names: Iterable[str] | None = None,
    markers: Markers = NO_MARKERS,
    field: str = FIELD,
) -> str:
    """Return the grammar from directly after an opener to the end of the call, or of the list of calls."""
    grammar = _Grammar(family, tools, names, markers, field)
    # A call may lack its opener: then it has no closer either.
    return grammar.text(grammar.inner(parallel, bare=family.bare))


def either(
    family: Family,
    tools: Sequence[Tool],
    schema: dict[str, Any],
    *,
    parallel: bool = True,
    names: Iterable[str] | None = None,
    markers: Markers = NO_MARKERS,
    field: str = FIELD,
) -> str:
    """Return the grammar of an answer that is either calls or JSON of a schema. The schema has been checked."""
    # llguidance chooses between text and JSON at the first character: a call that begins with a brace is JSON, too.
    grammar = _Grammar(family, tools, names, markers, field, whole=not family.opener)
    return grammar.text(_Rule(f"{grammar.calls(parallel)} | {grammar.answer(schema)}"))


def answer(family: Family, schema: dict[str, Any], *, markers: Markers = NO_MARKERS) -> str:
    """Return the grammar of an answer that is JSON of a schema, in the family's channel for answers."""
    grammar = _Grammar(family, (), None, markers, FIELD)
    return grammar.text(grammar.answer(schema))


class _Grammar:
    """Collects the rules of one grammar."""

    def __init__(
        self,
        family: Family,
        tools: Sequence[Tool],
        names: Iterable[str] | None,
        markers: Markers,
        field: str,
        *,
        whole: bool = False,
    ) -> None:
        self._family = family
        self._whole = whole  # whether a call of the form "object" is one JSON value
        self._tokens = dict(markers.tokens)
        self._ends = markers.ends
        self._split = re.compile("|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True))) or r"(?!)")
        self._lines: list[str] = []
        allowed = None if names is None else frozenset(names)
        self._tools = [
            (index, tool, field.format(index))
            for index, tool in enumerate(tools)
            if allowed is None or tool.name in allowed
        ]

    def text(self, start: str) -> str:
        return "\n".join((f"start: {start}", *self._lines)) + "\n"

    def rule(self, name: str, parts: Sequence[str]) -> _Rule:
        """Add a rule for a sequence of parts. Return its name."""
        self._lines.append(f"{name}: {self._sequence(parts)}")
        return _Rule(name)

    def answer(self, schema: dict[str, Any]) -> _Rule:
        """Return a rule for an answer in JSON."""
        text = json.dumps({**schema, "x-guidance": json_schema.OPTIONS}, ensure_ascii=False)
        return self.rule("answer", [_Marker(_FINAL if self._family.channels else ""), _json(text)])

    def calls(self, parallel: bool) -> _Rule:
        """Return a rule for whole calls, from the opener on."""
        family = self._family
        call = self.rule("call", [_Marker(family.opener), self.inner(parallel)])
        several = parallel and family.several and family.form not in ("array", "python")
        more = [_Rule(f"({self._sequence([_Marker(family.separator), call])})*")] if several else []
        return self.rule("calls", [_Marker(family.section), call, *more, *self._closing(family.section_closer)])

    def inner(self, parallel: bool, *, bare: bool = False) -> _Rule:
        """Return a rule for what follows the opener, up to the end of the closer."""
        family = self._family
        one = _Rule("one")
        self._lines.append("one: " + " | ".join(self._tool(*item) for item in self._tools))
        if family.form not in ("array", "python"):
            closer = self._closing(family.closer)
            optional = [_Rule(f"({self._sequence(closer)})?")] if bare and family.closer else closer
            return self.rule("inner", [one, *optional])
        more = [_Rule(f"({self._sequence([', ', one])})*")] if parallel and family.several else []
        return self.rule("inner", ["[", one, *more, "]", *self._closing(family.closer)])

    def _closing(self, closer: str) -> list[str]:
        """Return a closer, up to a token that ends the answer: the engine takes that as the end."""
        match = re.search("|".join(map(re.escape, self._ends)) or r"(?!)", closer)
        return [_Marker(closer if match is None else closer[: match.start()])]

    # One tool.

    def _tool(self, index: int, tool: Tool, field: str) -> _Rule:
        family = self._family
        name = json.dumps(tool.name, ensure_ascii=False)
        parts: list[str]
        if self._whole and family.form == "object":
            parts = [_json(tool_schema.call(tool, field, family.name_key, family.arguments_key))]
        elif family.form in ("object", "array"):
            schema = tool_schema.arguments(tool, field)
            head = f'"{family.name_key}": {name}, "{family.arguments_key}": '
            parts = ["{", head, _json(schema), "}"]
            if family.id_key is not None:
                call_id = [f'"{family.id_key}": "', _Rule(_id(family)), '"']
                last = family.id_length is not None  # Mistral's ids stand last, Command's numbers first
                order = [head, _json(schema), ", ", *call_id] if last else [*call_id, ", ", head, _json(schema)]
                parts = ["{", *order, "}"]
        elif family.form == "named":
            call_id = [_Marker(family.id_opener), _Rule(_id(family))] if family.id_opener in self._tokens else []
            optional = [_Rule(f"({self._sequence(call_id)})?")] if call_id else []
            parts = [tool.name, *optional, _Marker(family.middle), _json(tool_schema.arguments(tool, field))]
        elif family.form == "tagged":
            parts = [f"<function={tool.name}>\n", *self._tagged(index, tool, field), "</function>"]
        elif family.form == "python":
            parts = [f"{tool.name}(", *self._listed(index, tool, field, "=", ", "), ")"]
        else:
            parts = [f"{tool.name}{{", *self._listed(index, tool, field, ":", ","), "}"]
        return self.rule(f"tool_{index}", parts)

    def _members(self, tool: Tool, field: str) -> tuple[list[Member], str | None]:
        """Return the parameters that can be written in the family's form, and the schema of further ones."""
        form: Form = self._family.form
        members = tool_schema.members(tool, field, form)
        named = []
        for member in members.named:
            if _KEY[form].fullmatch(member.key):
                named.append(member)
            elif member.required:
                raise InvalidRequest(
                    f"'{field}': tool '{tool.name}': this model cannot write a parameter named {member.key[:60]!r}. "
                    "Use letters, digits and underscores.",
                    param=field,
                )
        if form == "braces":  # the templates sort them
            named.sort(key=lambda member: (member.key.lower(), member.key))
        return named, members.others

    def _tagged(self, index: int, tool: Tool, field: str) -> list[str]:
        named, others = self._members(tool, field)
        parts: list[str] = []
        for position, member in enumerate(named):
            value = self._raw(f"{index}_{position}", member, "\n</parameter>")
            rule = self.rule(f"member_{index}_{position}", [f"<parameter={member.key}>\n", *value, "\n"])
            parts.append(rule if member.required else _Rule(f"{rule}?"))
        if others is not None:
            key = self._other_key(index, named)
            value = [_json(others), "\n</parameter>\n"]
            parts.append(_Rule(f"{self.rule(f'other_{index}', ['<parameter=', key, '>' + chr(10), *value])}*"))
        return parts

    def _listed(self, index: int, tool: Tool, field: str, assign: str, separator: str) -> list[str]:
        """Return the parts of parameters with separators between them. An optional one may be missing.

        `first_i_k` is the list from parameter k on if none precedes it, `rest_i_k` if one does.
        """
        named, others = self._members(tool, field)
        end = len(named)
        if others is None:
            self._lines += [f'first_{index}_{end}: ""', f'rest_{index}_{end}: ""']
        else:
            other = self.rule(f"other_{index}", [self._other_key(index, named), assign, _json(others)])
            more = f"({self._sequence([separator, other])})*"
            self._lines += [f'first_{index}_{end}: {other} {more} | ""', f"rest_{index}_{end}: {more}"]
        for position in reversed(range(end)):
            member = named[position]
            rule = self.rule(
                f"member_{index}_{position}", [member.key + assign, *self._value(f"{index}_{position}", member)]
            )
            following = f"rest_{index}_{position + 1}"
            first = f"first_{index}_{position}: {rule} {following}"
            rest = f"rest_{index}_{position}: {self._sequence([separator, rule])} {following}"
            if not member.required:
                first += f" | first_{index}_{position + 1}"
                rest += f" | {following}"
            self._lines += [first, rest]
        return [_Rule(f"first_{index}_0")]

    def _value(self, suffix: str, member: Member) -> list[str]:
        """Return the parts of a value: text between the family's quotes, or JSON."""
        quote = self._family.quote
        if not member.words or not quote:
            return [_json(member.schema)]
        if quote not in self._tokens:
            return [quote, *self._raw(suffix, member, quote)]
        self._lines.append(f"WORDS_{suffix.upper()}: {_terminal(member.words)}")
        return [_Marker(quote), _Rule(f"WORDS_{suffix.upper()}"), _Marker(quote)]

    def _raw(self, suffix: str, member: Member, end: str) -> list[str]:
        """Return the parts of a value and the text that ends it. A string is raw text, up to the first such end."""
        if not member.words:
            return [_json(member.schema), end]
        ending = json.dumps(end)
        self._lines += [
            f"words_{suffix}[lazy]: WORDS_{suffix}",
            f"WORDS_{suffix}: ({_terminal(member.words, without=ending)}) {ending}",
        ]
        return [_Rule(f"words_{suffix}")]

    def _other_key(self, index: int, named: Sequence[Member]) -> _Rule:
        taken = " | ".join(json.dumps(member.key) for member in named)
        self._lines.append(f"KEY_{index}: /[a-zA-Z_][a-zA-Z0-9_]{{0,31}}/" + (f" & ~({taken})" if taken else ""))
        return _Rule(f"KEY_{index}")

    def _sequence(self, parts: Sequence[str]) -> str:
        """Return the grammar of a sequence. Adjacent text is one literal; the family's tokens are tokens."""
        written: list[str] = []
        text = ""

        def flush() -> None:
            nonlocal text
            if text:
                written.append(json.dumps(text, ensure_ascii=False))
            text = ""

        for part in parts:
            if isinstance(part, _Rule):
                flush()
                written.append(part)
            elif isinstance(part, _Marker):
                start = 0
                for match in self._split.finditer(part):
                    text += part[start : match.start()]
                    flush()
                    written.append(f"<[{self._tokens[match[0]]}]>")
                    start = match.end()
                text += part[start:]
            else:
                text += part
        flush()
        return " ".join(written) or '""'


def _id(family: Family) -> str:
    """Return the terminal of a call's id. One without a length is a number."""
    return "/[0-9]{1,3}/" if family.id_length is None else f"/[a-zA-Z0-9]{{{family.id_length}}}/"


def _json(schema: str) -> _Rule:
    return _Rule(f"%json {schema}")


def _terminal(words: Sequence[Words], without: str | None = None) -> str:
    """Return the terminal of a value's text, which does not contain the literal `without`."""
    text = " | ".join(dict.fromkeys(map(_alternative, words)))
    if without is None or text == "/(?s:.*)/":  # a lazy rule ends at the first `without` anyway
        return text
    return f"({text}) & ~(/(?s:.*)/ {without} /(?s:.*)/)"


def _alternative(words: Words) -> str:
    if words.values is not None:
        return "(" + " | ".join(json.dumps(value, ensure_ascii=False) for value in words.values) + ")"
    if not (words.shortest or words.patterns) and words.longest is None:
        return "/(?s:.*)/"
    length = f"/(?s:.{{{words.shortest},{'' if words.longest is None else words.longest}}})/"
    return "(" + " & ".join((length, *(f"/{pattern}/" for pattern in words.patterns))) + ")"
