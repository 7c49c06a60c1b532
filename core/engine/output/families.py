"""How model families write tool calls and reasoning: one table. The first row that fits a chat template applies.

A row says how a call looks. `core.engine.output.parsers` reads it, `core.engine.grammar.tools` constrains it, and
`core.engine.prompt.tools` shows earlier calls in it where the template cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How a call's name and arguments are written; J is JSON, NAME the tool's name.
#   object   opener {"name": "NAME", "arguments": J} closer
#   array    opener [{"name": "NAME", "arguments": J}, ...] closer
#   named    opener NAME middle J closer
#   tagged   opener <function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n...</function> closer; strings are raw
#   python   opener [NAME(KEY=VALUE, ...), ...] closer; values are literals of Python or JSON
#   braces   opener NAME{KEY:VALUE,...} closer; strings are between two `quote`s, other values are JSON
Form = Literal["object", "array", "named", "tagged", "python", "braces"]


@dataclass(frozen=True, slots=True)
class Think:
    """What encloses reasoning."""

    opener: str
    closer: str


@dataclass(frozen=True, slots=True)
class Family:
    """How one family writes calls.

    `signs`: the row applies if the chat template, or the vocabulary's markers, contain all of one of these groups.
    `opener` and `closer` enclose a call, or all calls of the forms "array" and "python"; `separator` is between two
    enclosed calls. An empty opener means that a call is the whole message and begins with its JSON. `heads` are further
    texts that begin a call where a model leaves out the opener. `ids`: what an "array" has as the call's id.
    """

    name: str
    form: Form
    signs: tuple[tuple[str, ...], ...] = ()
    opener: str = ""
    closer: str = ""
    separator: str = ""
    middle: str = ""
    quote: str = ""
    heads: tuple[str, ...] = ()
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str | None = None
    id_length: int | None = None
    several: bool = True  # whether one turn may hold several calls
    tools_variable: str = "tools"  # of the chat template
    think: Think | None = None


THINK = Think("<think>", "</think>")

FAMILIES = (
    Family(
        "harmony",
        "named",
        signs=(("<|channel|>", "<|call|>"),),
        opener="<|channel|>commentary to=functions.",
        middle=" <|constrain|>json<|message|>",
        closer="<|call|>",
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
        signs=(("<tool_call>", "<function="),),
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
        heads=("<function=",),
        think=THINK,
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
        signs=(("<｜tool▁calls▁begin｜>", "function<｜tool▁sep｜>"), ("<｜tool▁calls▁begin｜>", "'<｜tool▁sep｜>'")),
        opener="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        closer="\n```<｜tool▁call▁end｜>",
        think=THINK,
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
        signs=(("<|tool_call|>",), ("available_tools", "<tool_call>")),
        opener="<|tool_call|>",
        tools_variable="available_tools",
    ),
    Family(
        "functionary",
        "named",
        signs=(("<function=", "</function>"),),
        opener="<function=",
        middle=">",
        closer="</function>",
    ),
    Family(
        "hermes",
        "object",
        signs=(("<tool_call>",),),
        opener="<tool_call>\n",
        closer="\n</tool_call>",
        separator="\n",
        think=THINK,
    ),
    Family(
        "llama 3",
        "object",
        signs=(("<|python_tag|>",), ("<|eom_id|>",), ('"parameters":', "ipython")),
        arguments_key="parameters",
        several=False,
    ),
    # Every other template: the form that most models have seen.
    Family("generic", "object", opener="<tool_call>\n", closer="\n</tool_call>", separator="\n", think=THINK),
)
