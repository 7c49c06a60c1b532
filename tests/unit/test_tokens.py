"""/tokenize, /detokenize and input_tokens: equal to the real prompt, and safe for any tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from core.engine.llama import Llama
from core.engine.prompt import text
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import FakeHost, ScriptedEngine, fake_service
from tests.tiny_models import CONTROL, USER_DEFINED

LoadTiny = Callable[..., Llama]


def post(engine: Any, path: str, body: Any) -> tuple[int, Any]:
    fake = fake_service(host=FakeHost(engine))

    async def go() -> tuple[int, Any]:
        content = json.dumps(body).encode()
        request = Request("POST", path, "req_1", {"content-type": "application/json"}, body=content)
        response = await dispatch(fake.service, request)
        assert isinstance(response.body, bytes)
        return response.status, json.loads(response.body)

    answer = asyncio.run(go())
    assert fake.host.leases == 0
    return answer


@pytest.mark.parametrize("messages", [["Hello"], ["A <|im_end|> B", "<think>", "Ä 🎉"]])
def test_input_tokens_are_the_usage_of_the_real_chat(messages: list[str], tiny_engine: LoadTiny) -> None:
    """Counted by the same function that builds the real prompt."""
    engine = tiny_engine("control")
    body = {"messages": [{"role": "user", "content": content} for content in messages], "max_tokens": 1}

    status, counted = post(engine, "/v1/chat/completions/input_tokens", body)
    _, real = post(engine, "/v1/chat/completions", body)
    _, listed = post(engine, "/tokenize", body)

    assert status == 200
    assert counted == {"input_tokens": real["usage"]["prompt_tokens"], "object": "response.input_tokens"}
    assert listed["count"] == len(listed["tokens"]) == counted["input_tokens"]
    assert listed["max_model_len"] == engine.card.n_ctx


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
def test_tools_count_as_they_do_in_the_chat(choice: str, tiny_engine: LoadTiny) -> None:
    """They are part of the prompt."""
    engine = tiny_engine("control")
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "tool_choice": choice, "max_tokens": 1}

    _, counted = post(engine, "/v1/chat/completions/input_tokens", body)
    _, real = post(engine, "/v1/chat/completions", body)
    _, listed = post(engine, "/tokenize", body)

    assert counted["input_tokens"] == real["usage"]["prompt_tokens"] == listed["count"]


def test_counting_does_not_wait_for_a_slot() -> None:
    """All slots and the queue are taken, and the count comes."""
    engine = ScriptedEngine()
    engine.running = engine.config.n_parallel + engine.config.max_queue
    body = {"messages": [{"role": "user", "content": "Hi"}]}

    assert post(engine, "/v1/chat/completions", body)[0] == 429
    assert post(engine, "/v1/chat/completions/input_tokens", body)[0] == 200


def test_a_prompt_that_is_too_long_can_be_counted() -> None:
    """That is what counting is for."""
    engine = ScriptedEngine()
    body = {"messages": [{"role": "user", "content": "x" * 600}]}

    assert post(engine, "/v1/chat/completions", body)[0] == 400
    assert post(engine, "/v1/chat/completions/input_tokens", body)[1]["input_tokens"] > 600


@pytest.mark.parametrize("name", [*CONTROL, *USER_DEFINED])
def test_names_become_control_tokens_only_on_request(name: str, tiny_engine: LoadTiny) -> None:
    """User-defined tokens as well, which llama.cpp always recognises."""
    engine = tiny_engine("control")
    control = engine.tokenize(name, special=True)

    plain = post(engine, "/tokenize", {"content": f"a{name}b"})[1]["tokens"]
    parsed = post(engine, "/tokenize", {"content": f"a{name}b", "parse_special": True})[1]["tokens"]

    assert control[0] not in plain
    assert control[0] in parsed
    for tokens in (plain, parsed):
        assert post(engine, "/detokenize", {"tokens": tokens})[1] == {"content": f"a{name}b", "prompt": f"a{name}b"}


@pytest.mark.parametrize("kind", ["control", "spaced"])
@pytest.mark.parametrize("content", ["", "Hello", " Hello", "\n", "Ä 🎉 東京", "a\0b", "[INST] x </s>"])
def test_detokenizing_gives_the_text_back(kind: str, content: str, tiny_engine: LoadTiny) -> None:
    """Also on a vocabulary that puts a space in front of each text."""
    engine = tiny_engine(kind)
    tokens = post(engine, "/tokenize", {"content": content})[1]["tokens"]

    assert post(engine, "/detokenize", {"tokens": tokens})[1]["content"] == content


def test_bos_is_added_as_each_spelling_says(tiny_engine: LoadTiny) -> None:
    """llama-server adds it on request, vLLM unless it is switched off."""
    engine = tiny_engine("llama")
    bos = engine.tokenize(engine.card.bos, special=True)
    plain = post(engine, "/tokenize", {"content": "Hi"})[1]["tokens"]

    assert post(engine, "/tokenize", {"content": "Hi", "add_special": True})[1]["tokens"] == bos + plain
    assert post(engine, "/tokenize", {"prompt": "Hi"})[1]["tokens"] == bos + plain
    assert post(engine, "/tokenize", {"prompt": "Hi", "add_special_tokens": False})[1]["tokens"] == plain


def test_half_characters_show_as_bytes_or_as_replacements(tiny_engine: LoadTiny) -> None:
    """Each byte of a character is a token of its own here."""
    engine = tiny_engine("control")
    answer = post(engine, "/tokenize", {"content": "aé", "with_pieces": True, "return_token_strs": True})[1]

    assert [token["piece"] for token in answer["tokens"]] == ["a", [0xC3], [0xA9]]
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd"]
    first_half = answer["tokens"][1]["id"]
    assert post(engine, "/detokenize", {"tokens": [first_half]})[1]["content"] == "\ufffd"
    assert post(engine, "/detokenize", {"tokens": []})[1]["content"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "content"),
        ("/tokenize", {"content": 1}, "content"),
        ("/tokenize", {"content": "a", "with_pieces": "yes"}, "with_pieces"),
        ("/tokenize", {"content": "x" * (512 * text.LONGEST_TOKEN + 1)}, "content"),
        ("/tokenize", {"prompt": "x" * (512 * text.LONGEST_TOKEN + 1), "parse_special": True}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, 256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/v1/chat/completions/input_tokens", {}, "messages"),
        ("/v1/chat/completions/input_tokens", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ],
)
def test_a_clients_mistake_is_a_400_that_names_the_field(path: str, body: Any, param: str) -> None:
    """Out-of-range ids never reach llama.cpp."""
    status, answer = post(ScriptedEngine(), path, body)

    assert status == 400
    assert answer["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/chat/completions/input_tokens"])
def test_another_models_tokens_are_a_404(path: str) -> None:
    body = {"content": "a", "tokens": [1], "messages": [{"role": "user", "content": "a"}], "model": "gpt-4o"}
    if path == "/tokenize":
        del body["messages"]

    assert post(ScriptedEngine(), path, body)[0] == 404
