"""/infill: the prompt for a gap fits into the context, keeps what is near, and the answer is what editors read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engine.llama import Llama
from core.engine.prompt import infill
from core.engine.prompt.infill import File
from tests.fakes import ScriptedEngine
from tests.tiny_models import INFILL
from tests.unit.test_completions import post

LoadTiny = Callable[..., Llama]

# What llama.vim sends.
VIM: dict[str, Any] = {
    "input_prefix": "import os\n\n",
    "input_suffix": "\nprint(x)\n",
    "input_extra": [{"text": "x = 1\n", "time": [1, 2], "filename": "a.py"}],
    "prompt": "x = ",
    "n_predict": 128,
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached", "nothing"],
}


def ask(engine: Any, **fields: Any) -> tuple[int, Any]:
    return post(engine, "/infill", **{"input_prefix": "a", "input_suffix": "b", **fields})


def shown(engine: Llama, tokens: tuple[int, ...]) -> str:
    return b"".join(engine.token_pieces(tokens, special=True)).decode()


def test_llama_vim_gets_the_fields_that_it_asks_for() -> None:
    engine = ScriptedEngine("os.environ", cached_tokens=7)
    status, body = ask(engine, **VIM)

    assert status == 200
    prompt_tokens = len(engine.requests[0].prompt)
    assert body == {
        "content": "os.environ",
        "timings/prompt_n": prompt_tokens - 7,
        "timings/predicted_ms": 3.0,
        "truncated": False,
        "tokens_cached": prompt_tokens + 1,
    }


def test_the_prompt_is_the_files_and_then_the_gap(tiny_engine: LoadTiny) -> None:
    """Qwen's repository form, and the same without tokens for files."""
    files = [File("a.py", "x = 1\n"), File("b.py", "y = 2\n")]
    for kind, context in (
        (
            "infill",
            "<|repo_name|>project\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b.py\ny = 2\n<|file_sep|>untitled\n",
        ),
        ("infill-plain", "\n\n--- snippet ---\n\nx = 1\n\n\n--- snippet ---\n\ny = 2\n"),
    ):
        engine = tiny_engine(kind)
        tokens = engine.card.infill
        assert tokens is not None
        gap = "<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>"
        assert shown(engine, infill.window(engine, tokens, "before", "after", files, 8)) == context + gap
        assert shown(engine, infill.window(engine, tokens, "before", "after", [], 8)) == gap


@pytest.fixture
def code(tiny_engine: LoadTiny) -> Llama:
    return tiny_engine("infill", n_ctx=256)


TEXT = st.lists(st.sampled_from(["a", "bc", "\n", "é", *INFILL, "<think>"]), max_size=200).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=TEXT, after=TEXT, texts=st.lists(TEXT, max_size=4), n_predict=st.integers(0, 1000))
def test_the_prompt_fits_and_holds_what_is_near(
    code: Llama, before: str, after: str, texts: list[str], n_predict: int
) -> None:
    """It leaves room for the answer, cuts far ends only, and no text becomes a control token."""
    tokens = code.card.infill
    assert tokens is not None
    prompt = infill.window(code, tokens, before, after, [File(f"{i}", text) for i, text in enumerate(texts)], n_predict)

    room = 256 - min(max(1, n_predict), 64)
    assert len(prompt) <= room
    assert [token for token in prompt if token in tokens[:3]] == [tokens.prefix, tokens.suffix, tokens.middle]
    start, middle = prompt.index(tokens.prefix), prompt.index(tokens.suffix)
    prefix, suffix = prompt[start + 1 : middle], prompt[middle + 1 : -1]
    assert before.encode().endswith(b"".join(code.token_pieces(prefix, special=True)))
    assert after.encode().startswith(b"".join(code.token_pieces(suffix, special=True)))
    if len(prefix) + len(suffix) < room - 3:  # room was left: nothing was cut
        assert b"".join(code.token_pieces(prefix, special=True)) == before.encode()
        assert b"".join(code.token_pieces(suffix, special=True)) == after.encode()


def test_prefix_and_suffix_share_the_room_3_to_1(code: Llama) -> None:
    """If both are too long. What one leaves is for the other."""
    tokens = code.card.infill
    assert tokens is not None

    def lengths(before: str, after: str) -> tuple[int, int]:
        prompt = infill.window(code, tokens, before, after, [], 64)
        middle = prompt.index(tokens.suffix)
        return middle - 1, len(prompt) - middle - 2

    assert lengths("a" * 900, "b" * 900) == (142, 47)
    assert lengths("a" * 900, "b" * 9) == (180, 9)
    assert lengths("a" * 9, "b" * 900) == (9, 180)


def test_the_last_files_are_kept(code: Llama) -> None:
    """Whole ones, as long as they fit."""
    tokens = code.card.infill
    assert tokens is not None
    files = [File("old", "o" * 60), File("big", "p" * 500), File("new", "q" * 40)]
    text = shown(code, infill.window(code, tokens, "a", "b", files, 64))

    assert "new" in text
    assert "old" not in text
    assert "big" not in text


def test_the_stream_adds_up_to_the_whole(tiny_engine: LoadTiny) -> None:
    engine = tiny_engine("infill")
    fields = {"n_predict": 12, "seed": 5}
    _, whole = ask(engine, **fields)
    _, events = ask(engine, **fields, stream=True)

    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["tokens_predicted"] == whole["tokens_predicted"]
    assert events[-1]["stop_type"] == whole["stop_type"]
    assert whole["timings"]["predicted_n"] == whole["tokens_predicted"]
    assert whole["tokens_evaluated"] == whole["timings"]["prompt_n"] + whole["timings"]["cache_n"]


def test_the_reason_of_the_end() -> None:
    limited = ask(ScriptedEngine("x y z"), n_predict=2)[1]
    ended = ask(ScriptedEngine("x y z"))[1]

    assert (limited["stop_type"], limited["tokens_predicted"], limited["content"]) == ("limit", 2, "x y ")
    assert (ended["stop_type"], ended["stopping_word"]) == ("eos", "")


def test_n_predict_0_reads_the_prompt_only() -> None:
    """llama.vim fills the cache with it."""
    engine = ScriptedEngine("x y z")
    status, body = ask(engine, n_predict=0)

    assert status == 200
    assert (body["content"], body["tokens_predicted"]) == ("", 0)
    assert engine.requests[0].max_tokens == 1


def test_without_the_tokens_it_is_a_501(tiny_engine: LoadTiny) -> None:
    """Streamed, too: the status is not sent before."""
    engine = tiny_engine("control")
    for stream in (False, True):
        status, body = ask(engine, stream=stream)
        assert status == 501
        assert body["error"]["code"] == "not_supported"
        assert body["error"]["type"] == "not_supported_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": 1}, "input_suffix"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"input_extra": "a"}, "input_extra"),
        ({"prompt": ["a"]}, "prompt"),
        ({"n_predict": -2}, "n_predict"),
        ({"temperature": 9}, "temperature"),
        ({"stop": [""]}, "stop[0]"),
        ({"grammar": "root ::= a"}, "grammar"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
    ],
)
def test_a_clients_mistake_is_a_400_that_names_the_field(fields: dict[str, Any], param: str) -> None:
    status, body = ask(ScriptedEngine(), **fields)

    assert status == 400
    assert body["error"]["param"] == param
