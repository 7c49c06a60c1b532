"""Which family a chat template belongs to, and what the rows of the table hold."""

import pytest

from core.engine.output.families import FAMILIES, family_of, marker_texts


def no_marker(text: str) -> bool:
    return False


TEMPLATES = {
    "harmony": "{{- '<|start|>assistant<|channel|>commentary' }} {{- '<|call|>' }}",
    "gemma 4": "{{- '<|tool_call>call:' + function['name'] + '{' -}} {{- '}<tool_call|>' -}}",
    "functiongemma": "{{- '<start_function_call>call:' ~ name -}}",
    "qwen coder": "<tool_call>\n<function=example>\n<parameter=a>\nvalue_1\n</parameter>\n</function>\n</tool_call>",
    "lfm2": "{{- '<|tool_call_start|>[' + calls + ']<|tool_call_end|>' -}}",
    "mistral 11": "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
    "mistral": "{{- '[TOOL_CALLS][' }}{{ ', \"id\": \"' + tool_call.id + '\"}' }}",
    "command r7b": "<|START_ACTION|>[{% for call in calls %}{% endfor %}]<|END_ACTION|>",
    "deepseek r1": "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json'",
    "deepseek v3.1": "'<｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>'",
    "phi 4 mini": "{{- '<|tool_call|>' + call + '<|/tool_call|>' -}}",
    "granite 3": "respond only with <|tool_call|> followed by a JSON list of tools used",
    "functionary": "start_tag => `<function` {{ '<|python_tag|>' }} {{ '<function=' + name + '>' + '</function>' }}",
    "smollm3": '{%- if xml_tools -%}<tool_call>\n{"name": <function-name>}\n</tool_call>{%- endif -%}',
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "llama 3": '{{- \'{"name": "\' + call.name + \'", "parameters": \' }} <|start_header_id|>ipython',
    "generic": "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>",
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_is_found_by_its_template(family):
    assert family_of(TEMPLATES[family.name], no_marker) is family


def test_a_model_without_template_has_the_generic_family():
    assert family_of(None, no_marker).name == "generic"


def test_granite_4_writes_calls_as_hermes_does():
    template = '{%- if available_tools %}<tools>{% endif %}<tool_call>\n{"name": <function-name>}\n</tool_call>'
    assert family_of(template, no_marker).name == "hermes"


def test_a_template_with_tags_and_no_calls_by_tag_is_not_functionary():
    template = "<seed:tool_call>\n<function=example>\n<parameter=a>value</parameter>\n</function>\n</seed:tool_call>"
    assert family_of(template, no_marker).name == "generic"


@pytest.mark.parametrize(
    ("markers", "name"),
    [
        ({"<|tool_call_start|>", "<|tool_call_end|>"}, "lfm2"),
        ({"[TOOL_CALLS]", "[ARGS]"}, "mistral 11"),
        ({"[TOOL_CALLS]"}, "mistral"),
        ({"<|tool_call|>", "<|/tool_call|>"}, "phi 4 mini"),
        ({"<tool_call>", "</tool_call>"}, "hermes"),
        ({"<|python_tag|>"}, "llama 3"),
    ],
)
def test_markers_of_the_vocabulary_count_where_the_template_has_none(markers, name):
    assert family_of("{{ messages }}", markers.__contains__).name == name


def test_template_and_vocabulary_together_make_a_sign():
    assert family_of("'[TOOL_CALLS]' + name", {"[ARGS]"}.__contains__).name == "mistral 11"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_is_complete(family):
    assert family.opener or family.bare  # a call can be recognised
    assert family.signs or family is FAMILIES[-1]
    assert (family.form == "braces") == bool(family.quote)
    assert (family.form == "named") == bool(family.middle)


def test_the_markers_of_a_family_are_the_names_in_its_texts():
    families = {family.name: marker_texts(family) for family in FAMILIES}
    assert families["hermes"] == ("<tool_call>", "</tool_call>", "<think>", "</think>")
    assert families["mistral 11"] == ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]")
    assert families["gemma 4"] == ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
    assert set(families["harmony"]) == {
        *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|end|>", "<|return|>")
    }
    assert families["llama 3"] == ("<think>", "</think>")
