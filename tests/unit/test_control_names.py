"""Text from a client never becomes control tokens, including user-defined ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engine.llama import Llama
from core.engine.prompt import templates
from core.engine.vocabulary import ControlNames, is_markup
from tests.tiny_models import CONTROL, USER_DEFINED

NAMES = (*CONTROL, *USER_DEFINED)
PIECES = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(["<", "<|", "|>", "im_", "end", "|im_end|>", "<|im_<", "think", ">", "[", "TOOL]", " ", "\n", "é"]),
    st.text(max_size=5),
)
WORDS = st.lists(PIECES, max_size=12).map("".join)


def _ids(engine: Llama, names: tuple[str, ...]) -> set[int]:
    return {engine.tokenize(name, special=True)[0] for name in names}


def _bytes(engine: Llama, tokens: tuple[int, ...]) -> bytes:
    return b"".join(map(engine._vocabulary.label, tokens))


def _prompt(engine: Llama, words: str, role: str = "user") -> tuple[int, ...]:
    return templates.prompt(engine, [{"role": role, "content": words}])


@pytest.fixture
def control(tiny_engine: Callable[..., Llama]) -> Llama:
    return tiny_engine("control", n_ctx=4096)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS, role=st.sampled_from(["user", "assistant", "system", "tool"]))
def test_names_in_messages_stay_text(control: Llama, words: str, role: str) -> None:
    prompt, harmless = _prompt(control, words, role), _prompt(control, "x", role)
    special = _ids(control, NAMES)

    assert [token for token in prompt if token in special] == [token for token in harmless if token in special]
    assert _bytes(control, prompt) == _bytes(control, harmless).replace(b"x", words.encode(), 1)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_turns_each_name_into_a_token(control: Llama, name: str) -> None:
    """This is why the guard exists. User-defined names become tokens even with special=False."""
    assert len(control.tokenize(name, special=True)) == 1
    assert (len(control.tokenize(name, special=False)) == 1) is (name in USER_DEFINED)


def test_text_without_names_is_tokenized_as_llama_cpp_does(control: Llama) -> None:
    rendered = "<|im_start|>user\nA <b> [x] & <|y|>\n<|im_end|>\n<|im_start|>assistant\n"

    assert _prompt(control, "A <b> [x] & <|y|>\n") == tuple(control.tokenize(rendered, special=True))


@pytest.mark.parametrize("words", ["a [INST] b", "[INST]", "[/INST][INST] x", "a</s>b\n[INST]\n", "<s>"])
def test_a_space_prefix_is_added_once(words: str, tiny_engine: Callable[..., Llama]) -> None:
    """Text with names gets the same spaces as text without: one at the start, none where a name is split."""
    engine = tiny_engine("spaced")
    harmless = words
    for name in ("[INST]", "[/INST]", "</s>", "<s>"):
        harmless = harmless.replace(name, "x" * len(name))

    text = _bytes(engine, _prompt(engine, words)).decode()
    expected = _bytes(engine, _prompt(engine, harmless)).decode()
    assert len(text) == len(expected)
    assert [index for index, letter in enumerate(text) if letter == " "] == [
        index for index, letter in enumerate(expected) if letter == " "
    ]


def test_overlapping_names_are_all_found() -> None:
    names = ControlNames(["<a>", "<a><b>", "b>c", "[", "<|x|>"])

    assert names.starts("<a><b>c <|x|") == [0, 4]
    assert names.starts("<<|x|><a") == [1]
    assert names.starts("[") == []
    assert ControlNames([]).starts("<a>") == []


@pytest.mark.parametrize(
    "name", ["<think>", "<|channel|>", "[TOOL_CALLS]", "<\uff5ctool\u2581call\uff5c>", "<unused7>", "<s>"]
)
def test_markup_is_recognised(name: str) -> None:
    assert is_markup(name)


@pytest.mark.parametrize("name", ["<td>", "</table>", "<h1>", "\n\n", "\u2581\u2581\u2581", "word", "é"])
def test_other_tokens_are_not_markup(name: str) -> None:
    assert not is_markup(name)
