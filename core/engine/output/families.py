"""How model families write tool calls and reasoning: one table. The first row that fits a chat template applies.

A row says how a call looks. `core.engine.output.parsers` reads it, `core.engine.grammar.tools` constrains it, and
`core.engine.prompt.tools` shows earlier calls in it where the template cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from msgspec import Struct

# How a call's name and arguments are written; J is JSON, NAME the tool's name.
#   object   opener {"name": "NAME", "arguments": J} closer
#   array    opener [{"name": "NAME", "arguments": J}, ...] closer
#   named    opener NAME id_opener ID middle J closer (the id and its opener only where there is an `id_opener`)
#   tagged   opener <function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n...</function> closer; strings are raw
#   python   opener [NAME(KEY=VALUE, ...), ...] closer; values are literals of Python or JSON
#   braces   opener NAME{KEY:VALUE,...} closer; strings are between two `quote`s, other values are JSON
Form = Literal["object", "array", "named", "tagged", "python", "braces"]


class Think(Struct, frozen=True):
    """What encloses reasoning."""

    opener: str
    closer: str


THINK = Think("<think>", "</think>")  # most families, and what is trained from any of them


class Family(Struct, frozen=True):
    """How one family writes calls.

    `signs`: the row applies if the chat template, or the vocabulary's markers, contain all of one of these groups.
    `opener` and `closer` enclose a call, or all calls of the forms "array" and "python"; `separator` is between two
    enclosed calls. `section` and `section_closer` enclose all calls of a turn, without a separator of their own.

    What a parser also accepts: `variants` are other openers. `heads` begin the body of a call whose opener the model
    leaves out. With `bare`, a message that is the body of a call, and nothing else, is one without opener and closer.
    With `channels`, each message of a turn names its channel (gpt-oss). `frame` has further markers that structure a
    turn and are no text.
    """

    name: str
    form: Form
    signs: tuple[tuple[str, ...], ...] = ()
    opener: str = ""
    closer: str = ""
    separator: str = ""
    section: str = ""
    section_closer: str = ""
    middle: str = ""
    quote: str = ""
    variants: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    bare: bool = False
    channels: bool = False
    frame: tuple[str, ...] = ()
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str | None = None
    id_length: int | None = None
    id_opener: str = ""
    several: bool = True  # whether one turn may hold several calls
    tools_variable: str = "tools"  # of the chat template
    think: Think = THINK


# The order decides: rows that are recognised by a template's text come before rows that only need a token.
FAMILIES = (
    Family(
        "harmony",
        "named",
        signs=(("<|channel|>", "<|call|>"),),
        opener="<|channel|>commentary to=functions.",
        middle=" <|constrain|>json<|message|>",
        closer="<|call|>",
        channels=True,
        frame=("<|start|>", "<|return|>"),
        several=False,
        think=Think("<|channel|>analysis<|message|>", "<|end|>"),
    ),
    Family(
        "gemma 4",
        "braces",
        signs=(("<|tool_call>", "<tool_call|>"),),
        opener="<|tool_call>call:",
        closer="<tool_call|>",
        quote='<|"|>',
        think=Think("<|channel>thought\n", "<channel|>"),
    ),
    Family(
        "functiongemma",
        "braces",
        signs=(("<start_function_call>",),),
        opener="<start_function_call>call:",
        closer="<end_function_call>",
        quote="<escape>",
    ),
    Family(
        "qwen coder",
        "tagged",
        signs=(("<tool_call>", "<function=", "<parameter="),),
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
        heads=("<function=",),
    ),
    Family(
        "lfm2",
        "python",
        signs=(("<|tool_call_start|>",),),
        opener="<|tool_call_start|>",
        closer="<|tool_call_end|>",
    ),
    Family(
        "mistral 11",
        "named",
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        opener="[TOOL_CALLS]",
        middle="[ARGS]",
        id_opener="[CALL_ID]",
        id_length=9,
        think=Think("[THINK]", "[/THINK]"),
    ),
    Family(
        "mistral",
        "array",
        signs=(("[TOOL_CALLS]",),),
        opener="[TOOL_CALLS]",
        id_key="id",
        id_length=9,
    ),
    Family(
        "command r7b",
        "array",
        signs=(("<|START_ACTION|>",),),
        opener="<|START_ACTION|>",
        closer="<|END_ACTION|>",
        name_key="tool_name",
        arguments_key="parameters",
        id_key="tool_call_id",
        think=Think("<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    Family(
        "deepseek r1",
        "named",
        signs=(("<｜tool▁call▁begin｜>", "```json"),),
        opener="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        closer="\n```<｜tool▁call▁end｜>",
        separator="\n",
        section="<｜tool▁calls▁begin｜>",
        section_closer="<｜tool▁calls▁end｜>",
    ),
    Family(
        "deepseek v3.1",
        "named",
        signs=(("<｜tool▁call▁begin｜>", "'<｜tool▁sep｜>'"),),
        opener="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        closer="<｜tool▁call▁end｜>",
        section="<｜tool▁calls▁begin｜>",
        section_closer="<｜tool▁calls▁end｜>",
    ),
    Family(
        "phi 4 mini",
        "array",
        signs=(("<|tool_call|>", "<|/tool_call|>"),),
        opener="<|tool_call|>",
        closer="<|/tool_call|>",
    ),
    Family(
        "granite 3",
        "array",
        signs=(("<|tool_call|>",),),
        opener="<|tool_call|>",
        variants=("<tool_call>",),
        tools_variable="available_tools",
    ),
    Family(
        "functionary",
        "named",
        signs=(("<function=", "</function>", "<|python_tag|>"),),
        opener="<function=",
        middle=">",
        closer="</function>",
    ),
    Family(
        "smollm3",
        "object",
        signs=(("xml_tools",),),
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
        tools_variable="xml_tools",
    ),
    Family(
        "hermes",
        "object",
        signs=(("<tool_call>",),),
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
    ),
    Family(
        "llama 3",
        "object",
        signs=(("<|python_tag|>",), ("<|eom_id|>",), ('"parameters":', "ipython")),
        bare=True,
        arguments_key="parameters",
        several=False,
    ),
    # Every other template: the form that most models have seen.
    Family(
        "generic",
        "object",
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
        bare=True,
    ),
)

_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def family_of(template: str | None, has_marker: Callable[[str], bool]) -> Family:
    """Return the first family that fits a chat template. `has_marker`: whether a text is one token of the vocabulary.

    None stands for ChatML's template, which has no signs.
    """
    text = template or ""
    for family in FAMILIES:
        if any(all(sign in text or has_marker(sign) for sign in group) for group in family.signs):
            return family
    return FAMILIES[-1]


def marker_texts(family: Family) -> tuple[str, ...]:
    """Return the texts of a family that may be one token of the vocabulary.

    A text such as "<tool_call>\\n" is a marker and text: only the marker is returned.
    """
    enclosing = (family.section, family.opener, *family.variants, family.closer, family.section_closer)
    inside = (family.quote, family.id_opener, family.middle)
    texts = (*enclosing, *inside, *family.frame, family.think.opener, family.think.closer)
    return tuple(dict.fromkeys(marker for text in texts for marker in _MARKER.findall(text)))
