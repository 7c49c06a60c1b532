"""Grammars of tool calls: what each family's form allows, and what of a tool's schema is enforced."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.engine.grammar import tools as grammars
from core.engine.output.dialect import NO_MARKERS, Markers
from core.engine.output.families import FAMILIES, Family
from core.errors import InvalidRequest


@dataclass(frozen=True)
class Function:
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False


WEATHER = Function(
    "get_weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
)
NOW = Function("now")
BY_NAME = {family.name: family for family in FAMILIES}
FIRST_MARKER = 257


def tokens_of(text: str, markers: Markers) -> list[int]:
    """One token per byte, and one for each marker."""
    tokens: list[int] = []
    names = dict(markers.tokens)
    while text:
        for name, token in names.items():
            if text.startswith(name):
                tokens.append(token)
                text = text[len(name) :]
                break
        else:
            tokens += text[0].encode()
            text = text[1:]
    return tokens


def tokenizer(markers: Markers) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = (
            *(bytes([byte]) for byte in range(256)),
            b"\xff<eos>",
            *(b"\xff" + name.encode() for name, _ in markers.tokens),
        )
        special_token_ids = (256, *(token for _, token in markers.tokens))

        def __call__(self, text: Any) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return LLTokenizer(TokenizerWrapper(Bytes()))


def accepts(grammar: str, text: str, markers: Markers = NO_MARKERS) -> bool:
    """Whether the grammar accepts the whole text."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer(markers), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokens_of(text, markers)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


def markers(*names: str) -> Markers:
    return Markers(tuple((name, FIRST_MARKER + index) for index, name in enumerate(names)))


CALLS = {
    "harmony": ('<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}', None),
    "gemma 4": ('<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>', ""),
    "functiongemma": ("<start_function_call>call:get_weather{city:<escape>Oslo<escape>}<end_function_call>", ""),
    "qwen coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        "\n",
    ),
    "lfm2": ('<|tool_call_start|>[get_weather(city="Oslo", unit="c"), now()]<|tool_call_end|>', None),
    "mistral 11": ('[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}', ""),
    "mistral": ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "aB3dE6gH9"}]', None),
    "command r7b": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Oslo"}}]'
        "<|END_ACTION|>",
        None,
    ),
    "phi 4 mini": ('<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>', None),
    "granite 3": ('<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]', None),
    "functionary": ('<function=get_weather>{"city": "Oslo"}</function>', ""),
    "hermes": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "f"}}\n</tool_call>', "\n"),
    "llama 3": ('{"name": "get_weather", "parameters": {"city": "Oslo"}}', None),
    "generic": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>', "\n"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_required_call_has_the_familys_form(name: str) -> None:
    """The separator of several calls, or None where one text holds all of them."""
    call, separator = CALLS[name]
    ends = frozenset(("<|call|>",))
    grammar = grammars.required(BY_NAME[name], [WEATHER, NOW], markers=Markers(ends=ends))
    single = grammars.required(BY_NAME[name], [WEATHER, NOW], parallel=False, markers=Markers(ends=ends))

    assert accepts(grammar, call)
    assert not accepts(grammar, "Hello")
    assert not accepts(grammar, call.replace("city", "town"))
    if separator is not None:
        assert accepts(grammar, call + separator + call)
        assert not accepts(single, call + separator + call)


DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"


def test_a_section_encloses_all_calls() -> None:
    """It begins and ends once."""
    grammar = grammars.required(BY_NAME["deepseek r1"], [WEATHER, NOW])

    assert accepts(grammar, f"<｜tool▁calls▁begin｜>{DEEPSEEK}\n{DEEPSEEK}<｜tool▁calls▁end｜>")
    assert not accepts(grammar, DEEPSEEK)


def test_an_opened_call_is_constrained_to_its_end() -> None:
    """The grammar begins behind the opener."""
    hermes = grammars.call(BY_NAME["hermes"], [WEATHER, NOW])
    lfm2 = grammars.call(BY_NAME["lfm2"], [WEATHER, NOW])

    assert accepts(hermes, '{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(hermes, '{"name": "then", "arguments": {}}\n</tool_call>')
    assert accepts(lfm2, "[now(), now()]<|tool_call_end|>")


def test_names_narrow_the_tools() -> None:
    grammar = grammars.required(BY_NAME["hermes"], [WEATHER, NOW], names=["now"])

    assert accepts(grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(grammar, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a"}}\n</tool_call>')


def test_a_call_or_json_may_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for family in ("hermes", "llama 3"):
        grammar = grammars.either(BY_NAME[family], [NOW], schema)
        key = BY_NAME[family].arguments_key
        call = f'{{"name": "now", "{key}": {{}}}}'
        call = f"<tool_call>\n{call}\n</tool_call>" if family == "hermes" else call

        assert accepts(grammar, call)
        assert accepts(grammar, '{"a": 1}')
        assert not accepts(grammar, '{"a": "1"}')


def test_a_marker_that_is_a_token_is_no_text() -> None:
    """Text that spells the marker does not open a call."""
    own = markers("<tool_call>", "</tool_call>")
    grammar = grammars.required(BY_NAME["hermes"], [NOW], markers=own)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

    assert accepts(grammar, call, own)
    assert grammar.count(f"<[{FIRST_MARKER}]>") == 1
    assert not accepts(grammar, call.replace("<tool_call>", "<tool_cal" + "l>", 1).replace("<tool", "< tool", 1), own)


def test_strings_of_gemma_4_are_between_tokens() -> None:
    """They may hold anything but the token."""
    own = markers("<|tool_call>", "<tool_call|>", '<|"|>')
    grammar = grammars.required(BY_NAME["gemma 4"], [WEATHER], markers=own)

    assert accepts(grammar, '<|tool_call>call:get_weather{city:<|"|>a"}, {b\n<|"|>}<tool_call|>', own)
    assert accepts(grammar, '<|tool_call>call:get_weather{city:<|"|><|"|>}<tool_call|>', own)


RAW = Function(
    "write",
    {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 2},
            "code": {"type": "string", "pattern": "^[a-z]{2}$|^-$"},
            "word": {"type": "string", "pattern": "^(up|down)$"},
            "when": {"type": "string", "format": "date"},
            "some": {"type": "array", "items": {"type": "string"}},
            "many": {"type": ["string", "null"]},
        },
        "required": ["text"],
    },
)


def tagged(**values: str) -> str:
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=write>\n{lines}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"text": 'a <b> "c"\n\n{'}, True),
        ({"text": "a"}, False),
        ({"text": "ab</parameter>"}, True),
        ({"text": "ab\n</parameter> and more"}, False),
        ({"text": "ab", "word": "down"}, True),
        ({"text": "ab", "word": "left"}, False),
        ({"text": "ab", "when": "2026-11-24"}, True),
        ({"text": "ab", "when": "today"}, False),
        ({"text": "ab", "some": '["x", "y"]', "many": "null"}, True),
        ({"text": "ab", "some": "x"}, False),
        ({"text": "ab", "many": '"x"'}, True),
        ({"word": "up"}, False),
        ({"word": "up", "text": "ab"}, False),
    ],
)
def test_tagged_strings_are_raw(values: dict[str, str], fits: bool) -> None:
    """A string ends at the first end of a parameter. Others are JSON. Optional ones may be missing, in order."""
    assert accepts(grammars.required(BY_NAME["qwen coder"], [RAW], parallel=False), tagged(**values)) is fits


def test_a_strict_tool_is_enforced_or_refused() -> None:
    """The error names the tool, the keyword and the field."""
    odd = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}}
    with pytest.raises(InvalidRequest, match="tool 'f': the JSON Schema keyword 'not' at #/properties/a") as caught:
        grammars.required(BY_NAME["hermes"], [NOW, Function("f", odd, strict=True)])
    assert caught.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "integer", "not": {"const": 3}}, "#/properties/a/not"),
        ({"type": "integer", "nullable": True, "format": "int32"}, "#/properties/a/nullable, #/properties/a/format"),
        ({"type": "integer", "required": True}, "#/properties/a/required"),
        ({"allOf": [{"type": "integer", "if": {}}]}, "#/properties/a/allOf/if"),
    ],
)
def test_another_tool_is_enforced_as_far_as_possible(
    schema: dict[str, Any], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A keyword that cannot be enforced is left out alone, and logged."""
    from core.engine.grammar import tool_schema

    tool_schema._prepare.cache_clear()
    tool = Function("f", {"type": "object", "properties": {"a": schema}, "required": ["a"]})
    with caplog.at_level(logging.INFO, "slm.tools"):
        grammar = grammars.required(BY_NAME["llama 3"], [tool])

    assert accepts(grammar, '{"name": "f", "parameters": {"a": 3}}')
    assert not accepts(grammar, '{"name": "f", "parameters": {"a": "3"}}')
    assert f"'f' leaves out: {place}" in caplog.text


def test_a_parameter_that_cannot_be_compiled_may_be_anything() -> None:
    """The others are still enforced."""
    properties = {"a": {"$ref": "#/$defs/missing"}, "b": {"type": "integer"}}
    tool = Function("f", {"type": "object", "properties": properties, "required": ["a", "b"]})
    grammar = grammars.required(BY_NAME["llama 3"], [tool])

    assert accepts(grammar, '{"name": "f", "parameters": {"a": [1], "b": 2}}')
    assert not accepts(grammar, '{"name": "f", "parameters": {"a": [1], "b": "2"}}')


@pytest.mark.parametrize(
    "parameters", [{}, {"type": "object"}, {"type": ["object", "null"], "properties": {}}, {"properties": None}]
)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.form in ("object", "python", "braces")])
def test_a_schema_without_members_means_no_arguments(parameters: dict[str, Any], family: Family) -> None:
    grammar = grammars.required(family, [Function("f", parameters)])
    body = {"object": f'{{"name": "f", "{family.arguments_key}": {{}}}}', "python": "[f()]", "braces": "f{}"}

    assert accepts(grammar, f"{family.opener}{body[family.form]}{family.closer}")


@pytest.mark.parametrize("form", ["object", "tagged", "python", "braces"])
def test_a_map_may_have_any_keys(form: str) -> None:
    """`additionalProperties` without `properties` is a map."""
    tool = Function("f", {"type": "object", "additionalProperties": {"type": "integer"}})
    family = next(family for family in FAMILIES if family.form == form)
    body = {
        "object": '{"name": "f", "arguments": {"x": 1, "y": 2}}',
        "tagged": "<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n2\n</parameter>\n</function>",
        "python": "[f(x=1, y=2)]",
        "braces": "f{x:1,y:2}",
    }[form]
    grammar = grammars.required(family, [tool])

    assert accepts(grammar, f"{family.opener}{body}{family.closer}")
    assert not accepts(grammar, f"{family.opener}{body.replace('2', 'null')}{family.closer}")


@pytest.mark.parametrize("form", ["object", "tagged", "python", "braces"])
def test_references_into_the_tools_schema_work(form: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/node"}}, "b": {"$ref": "#/properties/a"}},
        "required": ["a"],
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    }
    family = next(family for family in FAMILIES if family.form == form)
    value = '[{"next": {"next": {}}}]'
    body = {
        "object": f'{{"name": "f", "arguments": {{"a": {value}}}}}',
        "tagged": f"<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>",
        "python": f"[f(a={value})]",
        "braces": f"f{{a:{value}}}",
    }[form]
    grammar = grammars.required(family, [Function("f", parameters, strict=True)])

    assert accepts(grammar, f"{family.opener}{body}{family.closer}")
    assert not accepts(grammar, f"{family.opener}{body.replace('{}', '1')}{family.closer}")


def many_tools(count: int) -> list[Function]:
    parameters: dict[str, Any] = {
        "a": {"type": "string", "description": "what it is " * 20, "maxLength": 100},
        "b": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": "and this " * 40},
        "c": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "string"}}}},
        "d": {"type": "integer", "format": "int64", "nullable": True, "description": "or that " * 60},
        "e": {"enum": ["alpha", "beta", "gamma"], "description": "one of " * 40},
    }
    return [
        Function(f"tool_{index}", {"type": "object", "properties": parameters, "required": ["a"]})
        for index in range(count)
    ]


@pytest.mark.parametrize("name", ["hermes", "qwen coder"])
def test_sixty_tools_of_a_hundred_kilobytes_compile(name: str) -> None:
    tools = many_tools(60)
    assert sum(len(json.dumps(tool.parameters)) for tool in tools) > 80_000

    start = time.process_time()
    grammar = grammars.required(BY_NAME[name], tools)
    key = "{" if name == "hermes" else "<"
    assert not accepts(grammar, f"<tool_call>\n{key}")
    assert time.process_time() - start < 10


def test_tools_that_are_too_large_are_refused() -> None:
    from core.engine.grammar import tool_schema

    large = {"type": "object", "description": "x" * tool_schema.MAX_BYTES}
    with pytest.raises(InvalidRequest, match=r"'tools\[0\].parameters': tool 'f': its parameters have \d+ bytes"):
        tool_schema.check([Function("f", large)], "tools[{}].parameters")
    large = {"type": "object", "description": "x" * (tool_schema.MAX_BYTES - 100)}
    with pytest.raises(InvalidRequest, match=r"'tools': the parameters of all tools have \d+ bytes"):
        tool_schema.check([Function(f"f{index}", large) for index in range(9)], "tools[{}].parameters")
