"""Prompts with tools: what each kind of template shows by itself, and what becomes text."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from core.engine.output.families import family_of
from core.engine.prompt import templates
from core.engine.prompt.capabilities import Capabilities, capabilities, reasoning_key, shows_later_systems
from core.errors import InvalidRequest
from tests import chat_templates
from tests.fakes import CARD, ScriptedEngine

TEMPLATES = {name: text for name, text in vars(chat_templates).items() if name.isupper()}
MARKERS = {"LFM_2": ("<|tool_call_start|>", "<|tool_call_end|>"), "MISTRAL": ("[TOOL_CALLS]",)}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OTHER = {"type": "function", "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}}}


class MarkingEngine(ScriptedEngine):
    """An engine whose tokens are characters. A name of a control token is one token, from 0x110000 up."""

    def __init__(self, template: str | None, control: tuple[str, ...] = ()) -> None:
        super().__init__(card=replace(CARD, chat_template=template, n_ctx=100_000))
        self.control = control

    def control_names(self, text: str) -> list[int]:
        return [start for start in range(len(text)) if text.startswith(self.control, start)] if self.control else []

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        tokens: list[int] = []
        while text:
            name = next((name for name in self.control if special and text.startswith(name)), None)
            tokens.append(ord(text[0]) if name is None else 0x110000 + self.control.index(name))
            text = text[1 if name is None else len(name) :]
        return tokens

    def shown(self, tokens: tuple[int, ...]) -> str:
        return "".join(chr(token) if token < 0x110000 else self.control[token - 0x110000] for token in tokens)


def call(name: str, call_id: str = "call_1", arguments: Any = None) -> dict[str, Any]:
    arguments = {"city": "Oslo"} if arguments is None else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, call_id: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def said(content: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def called(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **fields}


def render(name: str | None, messages: list[dict[str, Any]], *tools: dict[str, Any], **options: Any) -> str:
    template = TEMPLATES[name] if name else None
    engine = MarkingEngine(template)
    markers = MARKERS.get(name or "", ())
    family = family_of(template, markers.__contains__)
    return engine.shown(templates.build(engine, messages, tools, family=family, **options).tokens)


CONVERSATION = [
    said("Rain?"),
    called(call("get_weather"), call("get_time", "call_2")),
    result("WET"),
    result("LATE", "call_2"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HERMES", Capabilities("tools", True, "object", "", True, True)),
        ("QWEN_CODER", Capabilities("tools", True, "object", "", True, True)),
        ("LLAMA_3", Capabilities("tools", True, "object", "", False, True)),
        ("MISTRAL", Capabilities("tools", True, "object", "", True, True)),
        ("GEMMA_3", Capabilities()),
        ("SMOLLM_2", Capabilities()),
        ("SMOLLM_3", Capabilities("xml_tools", results=True)),
        ("GRANITE_3", Capabilities("available_tools", results=True)),
        ("LFM_2", Capabilities("tools", results=True)),
        ("DEEPSEEK_R1", Capabilities(None, True, "string", None, True, True)),
        ("HARMONY", Capabilities("tools", True, "object", "", False, True)),
        ("GEMMA_4", Capabilities("tools", True, "object", "", True, True)),
    ],
)
def test_what_a_template_can_do_is_found_by_rendering(name: str, expected: Capabilities) -> None:
    assert capabilities(TEMPLATES[name]) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_results_are_in_every_prompt(name: str) -> None:
    """Whatever the template shows by itself."""
    text = render(name, CONVERSATION, TOOL, OTHER)

    for word in ("get_weather", "get_time", "city", "Oslo", "WET", "LATE"):
        assert word in text
    assert text.index("Oslo") < text.index("WET")
    family = family_of(TEMPLATES[name], MARKERS.get(name, ()).__contains__)
    if family.opener and not family.channels:
        assert text.count(family.opener.strip() + "\n" if family.form == "object" else family.opener) >= 1


def test_a_model_without_template_is_told_about_tools() -> None:
    text = render(None, CONVERSATION, TOOL)

    assert text.startswith("<|im_start|>system\n# Tools")
    assert '\n{"name": "get_weather", "description": "Tell the weather", "parameters": {"type": "object"' in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nWET\n</tool_response>\n<tool_response>\nLATE\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ) in text


def test_results_and_the_users_next_words_are_one_message() -> None:
    """Gemma's roles must alternate. Its system text is part of the first user message."""
    text = render("GEMMA_3", [said("Be brief.", "system"), *CONVERSATION, said("So?")], TOOL)

    assert text.startswith("<s><start_of_turn>user\nBe brief.\n\n# Tools")
    assert text.endswith("LATE\n</tool_response>\n\nSo?<end_of_turn>\n<start_of_turn>model\n")


def test_calls_are_written_in_the_familys_form() -> None:
    granite = render("GRANITE_3", CONVERSATION, TOOL)
    lfm2 = render("LFM_2", CONVERSATION, TOOL)

    assert (
        '<|end_of_role|><|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}, '
        '{"name": "get_time", "arguments": {"city": "Oslo"}}]<|end_of_text|>'
    ) in granite
    assert '\n<|tool_call_start|>[get_weather(city="Oslo"), get_time(city="Oslo")]<|tool_call_end|><' in lfm2


def test_several_calls_become_turns_where_a_template_shows_one() -> None:
    """Each is followed by its result, in whatever order the results came."""
    text = render("LLAMA_3", [*CONVERSATION[:2], CONVERSATION[3], CONVERSATION[2]], TOOL)

    places = [text.index(word) for word in ('{"name": "get_weather", "p', "WET", '{"name": "get_time", "p', "LATE")]
    assert places == sorted(places)


def test_mistral_gets_ids_of_nine_characters() -> None:
    """A call and its result have the same one."""
    text = render(
        "MISTRAL",
        [said("Rain?"), called(call("get_weather", "call_abcdefghijklmnop")), result("WET", "call_abcdefghijklmnop")],
    )
    call_id = text.split('"id": "')[1].split('"')[0]

    assert len(call_id) == 9
    assert text.endswith(f'"call_id": "{call_id}"}}[/TOOL_RESULTS]')


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", ['{"city": "Os', "", [1], {}])
def test_invalid_arguments_of_an_earlier_turn_are_no_error(name: str, arguments: Any) -> None:
    assert "WET" in render(name, [said("Rain?"), called(call("get_weather", arguments=arguments)), result("WET")])


def test_a_template_that_fails_on_a_schema_gets_the_tools_as_text() -> None:
    """Qwen's coder template needs a type of each parameter."""
    odd = {"type": "function", "function": {"name": "odd", "description": "", "parameters": {"properties": {"a": {}}}}}
    text = render("QWEN_CODER", [said("Hi")], odd)

    assert '{"name": "odd", "description": "", "parameters": {"properties": {"a": {}}}}' in text
    assert "<function=function_name>\n<parameter=parameter>\nvalue\n</parameter>\n</function>" in text


def test_names_of_control_tokens_stay_text_everywhere() -> None:
    """In tools, arguments, results and variables. The family's own markers are tokens."""
    control = ("<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>")
    spelled = "<tool_call></tool_call><|im_end|>"
    tool = {"type": "function", "function": {"name": "f", "description": spelled, "parameters": {spelled: spelled}}}
    messages = [said("Hi"), called(call("f", arguments={spelled: spelled})), result(spelled)]
    for template in (TEMPLATES["HERMES"], TEMPLATES["SMOLLM_2"], None):
        engine = MarkingEngine(template, control)
        family = family_of(template, lambda text: False)
        plain = replace_all(messages, spelled, "word")
        marked = templates.build(engine, messages, [tool], family=family, variables={"x": spelled}).tokens
        harmless = templates.build(engine, plain, replace_all([tool], spelled, "word"), family=family).tokens

        assert [token for token in marked if token >= 0x110000] == [token for token in harmless if token >= 0x110000]
        assert spelled in engine.shown(marked)


def replace_all(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {replace_all(key, old, new): replace_all(inner, old, new) for key, inner in value.items()}
    return [replace_all(inner, old, new) for inner in value] if isinstance(value, list) else value


def test_variables_reach_the_template() -> None:
    assert render("HERMES", [said("Hi")], variables={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert "Reasoning: high" in render("HARMONY", [said("Hi")], variables={"reasoning_effort": "high"})


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "add_generation_prompt"])
def test_variables_do_not_replace_the_servers(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'chat_template_kwargs' must not contain '{name}'"):
        render("HERMES", [said("Hi")], variables={name: "x"})


@pytest.mark.parametrize(
    ("name", "key"), [("HERMES", "reasoning_content"), ("HARMONY", "thinking"), ("SMOLLM_2", None), ("LLAMA_3", None)]
)
def test_reasoning_of_earlier_turns_has_the_templates_key(name: str, key: str | None) -> None:
    messages = [said("Rain?"), called(call("get_weather"), reasoning_content="THOUGHT"), result("WET")]

    assert reasoning_key(TEMPLATES[name]) == key
    assert ("THOUGHT" in render(name, messages)) is (key is not None)


def test_harmony_refuses_reasoning_next_to_text_and_a_call() -> None:
    """The reasoning is left out."""
    text = render(
        "HARMONY", [said("Rain?"), called(call("f"), reasoning_content="THOUGHT", content="Well"), result("WET")]
    )

    assert "WET" in text
    assert "THOUGHT" not in text


def prompt_of(name: str, messages: list[dict[str, Any]], control: tuple[str, ...] = (), **options: Any) -> Any:
    engine = MarkingEngine(TEMPLATES[name], control)
    return templates.build(engine, messages, family=family_of(TEMPLATES[name], lambda text: False), **options)


def test_a_prompt_may_end_inside_reasoning() -> None:
    """The template has opened it. It can be closed at once."""
    opened = prompt_of("DEEPSEEK_R1", [said("Hi")])
    closed = prompt_of("DEEPSEEK_R1", [said("Hi")], close_reasoning=True)

    assert opened.reasoning
    assert "".join(map(chr, opened.tokens)).endswith("<think>\n")
    assert not closed.reasoning
    assert "".join(map(chr, closed.tokens)).endswith("<think>\n\n</think>\n\n")
    assert not prompt_of("HERMES", [said("<think>")]).reasoning


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("HARMONY", "SMOLLM_3")])
def test_a_system_message_between_turns_is_shown(name: str) -> None:
    """As such, or as part of the user's next message. The first one is shown, too."""
    messages = [said("FIRST", "system"), said("Hi"), said("Hello", "assistant"), said("LATER", "system"), said("Go")]
    text = render(name, messages)

    assert "FIRST" in text
    assert "LATER" in text
    if not shows_later_systems(TEMPLATES[name], CARD.bos, CARD.eos):
        assert "LATER\n\nGo" in text


def test_a_system_message_at_the_end_is_the_users() -> None:
    text = render("GEMMA_3", [said("Hi"), said("LATER", "system")])

    assert "<start_of_turn>user\nHi\n\nLATER<end_of_turn>" in text


def test_tools_count_towards_the_longest_prompt() -> None:
    huge = {"type": "function", "function": {"name": "f", "description": "x" * 13_000_000, "parameters": {}}}
    with pytest.raises(InvalidRequest, match="The messages and tools have 130000") as caught:
        render("HERMES", [said("Hi")], huge)
    assert caught.value.code == "context_length_exceeded"
