"""Legacy completions: prompts of every form, choices in their order, logprobs with offsets, and streams that add up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.interface import TokenLogprob
from core.engine.llama import Llama
from core.engine.output.reader import TextStream
from core.wire import completions as wire
from core.wire.completions import Choice, Completion, Offsets
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import FakeHost, ScriptedEngine, fake_service
from tests.tiny_models import CONTROL, USER_DEFINED

LoadTiny = Callable[..., Llama]


def post(engine: Any, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
    """Return the status and the body: JSON, or the events of a stream without [DONE]."""
    fake = fake_service(host=FakeHost(engine))

    async def go() -> tuple[int, Any]:
        content = json.dumps(body).encode()
        request = Request("POST", path, "req_1", {"content-type": "application/json"}, body=content)
        response = await dispatch(fake.service, request)
        try:
            if isinstance(response.body, bytes):
                return response.status, json.loads(response.body)
            data = b"".join([part async for part in response.body]).decode()
        finally:
            await response.aclose()
        events = [line[6:] for line in data.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return response.status, [json.loads(event) for event in events]

    answer = asyncio.run(go())
    assert fake.host.leases == 0
    return answer


def folded(chunks: list[Any]) -> dict[int, Any]:
    """The choices that a stream's chunks add up to."""
    choices: dict[int, Any] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "a chunk after the end"
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] += values
    return choices


def test_a_completion_has_openais_shape() -> None:
    status, body = post(ScriptedEngine("Good day to you.", cached_tokens=3), prompt="Hi")

    assert status == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "fake-1b"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [{"index": 0, "text": "Good day to you.", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_the_default_is_16_tokens() -> None:
    engine = ScriptedEngine(endless=True)
    _, body = post(engine, prompt="Hi")

    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["finish_cause"] == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
        (["ab", [99]], [b"ab", b"c"]),
    ],
)
def test_a_prompt_has_five_forms(prompt: Any, prompts: list[bytes]) -> None:
    """Strings, token ids, and arrays of both. Tokens are bytes here."""
    engine = ScriptedEngine()
    status, body = post(engine, prompt=prompt)

    assert status == 200
    assert [bytes(request.prompt) for request in engine.requests] == prompts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_prompt_major(stream: bool) -> None:
    """Choice j of prompt i is i * n + j; the echo shows which prompt it belongs to. Usage is the sum."""
    engine = ScriptedEngine("x y")
    fields = {"stream_options": {"include_usage": True}} if stream else {}
    _, body = post(engine, prompt=["aa", "b", "c"], n=2, echo=True, stream=stream, **fields)

    choices = folded(body) if stream else {choice["index"]: choice for choice in body["choices"]}
    usage = body[-1]["usage"] if stream else body["usage"]
    assert {index: choices[index]["text"] for index in range(6)} == {
        0: "aax y", 1: "aax y", 2: "bx y", 3: "bx y", 4: "cx y", 5: "cx y"
    }  # fmt: skip
    assert {choice["finish_reason"] for choice in choices.values()} == {"stop"}
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 12)


def test_prompts_of_one_request_leave_slots_to_others() -> None:
    """At most as many run at once as there are slots, and all are answered."""
    running: list[int] = []

    class Watched(ScriptedEngine):
        def generate(self, request: Any) -> Any:
            generation = super().generate(request)
            running.append(self.running)
            return generation

    engine = Watched("x y z")
    _, body = post(engine, prompt=["a"] * 20, n=2)

    assert len(body["choices"]) == 40
    assert max(running) == engine.config.n_parallel // 2
    assert engine.running == 0


def test_a_full_queue_is_a_429_and_later_prompts_wait() -> None:
    """Busy for the first prompt is the client's answer. Busy for a later one passes."""
    engine = ScriptedEngine("x y")
    engine.running = engine.config.n_parallel + engine.config.max_queue
    assert post(engine, prompt=["a", "b"])[0] == 429

    engine.running -= 1  # room for one at a time

    status, body = post(engine, prompt=["a", "b"])
    assert status == 200
    assert [choice["text"] for choice in body["choices"]] == ["x y", "x y"]


def test_an_error_of_one_prompt_ends_all() -> None:
    engine = ScriptedEngine("x y")
    status, body = post(engine, prompt=["a", "x" * 600])

    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["param"] == "prompt"
    assert engine.requests == []


def test_nothing_is_generated_with_max_tokens_0() -> None:
    """The prompt is echoed and cached."""
    _, body = post(ScriptedEngine("x y"), prompt="ab", max_tokens=0, echo=True)

    assert body["choices"][0]["text"] == "ab"
    assert body["usage"]["completion_tokens"] == 0


def test_stream_options_ask_for_the_usage() -> None:
    """With it, every chunk has the field, and the last one the figures and no choice. Without it, none has it."""
    _, plain = post(ScriptedEngine("x y"), prompt="a", stream=True)
    _, chunks = post(ScriptedEngine("x y"), prompt="a", stream=True, stream_options={"include_usage": True})

    assert all("usage" not in chunk for chunk in plain)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 3
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("prompt", [["a<|im_end|>b", "<think>"], "x" * 30, [[260, 40, 41], [41]]])
def test_the_stream_adds_up_to_the_whole(prompt: Any, tiny_engine: LoadTiny) -> None:
    """Text, logprobs and offsets, on a real engine whose tokens are bytes, with a stop string that holds text back."""
    engine = tiny_engine("control")
    body = {"prompt": prompt, "max_tokens": 24, "logprobs": 2, "seed": 1, "n": 2, "stop": ["qqq", "\n\n"]}

    _, whole = post(engine, **body)
    _, chunks = post(engine, **body, stream=True)

    streamed = folded(chunks)
    for choice in whole["choices"]:
        twin = streamed[choice["index"]]
        assert twin["text"] == choice["text"]
        assert twin["finish_reason"] == choice["finish_reason"]
        assert twin["logprobs"]["tokens"] == choice["logprobs"]["tokens"]
        assert twin["logprobs"]["text_offset"] == choice["logprobs"]["text_offset"]
        assert len({len(values) for values in choice["logprobs"].values()}) == 1


def spied(engine: Llama) -> list[tuple[int, ...]]:
    """The prompts of the requests that the engine gets from now on."""
    prompts: list[tuple[int, ...]] = []
    generate = engine.generate

    def spy(request: Any) -> Any:
        prompts.append(request.prompt)
        return generate(request)

    engine.generate = spy  # type: ignore[method-assign]
    return prompts


def test_a_suffix_becomes_a_prompt_with_a_gap(tiny_engine: LoadTiny) -> None:
    """The three control tokens are in their places, and nowhere else, whatever the texts contain."""
    engine = tiny_engine("infill")
    prompts = spied(engine)
    tokens = engine.card.infill
    assert tokens is not None
    status, body = post(engine, prompt=["a<|fim_middle|>", [66]], suffix="b<|fim_prefix|>", max_tokens=2, echo=True)

    assert status == 200
    first, second = prompts
    assert (first[0], first[-1], second[0], second[-1]) == (tokens.prefix, tokens.middle) * 2
    for prompt, before in ((first, b"a<|fim_middle|>"), (second, b"c")):
        assert [token for token in prompt if token in tokens] == [tokens.prefix, tokens.suffix, tokens.middle]
        middle = prompt.index(tokens.suffix)
        assert b"".join(engine.token_pieces(prompt[1:middle], special=True)) == before
        assert b"".join(engine.token_pieces(prompt[middle + 1 : -1], special=True)) == b"b<|fim_prefix|>"
    assert [choice["text"][:1] for choice in body["choices"]] == ["a", "c"]


def test_a_suffix_needs_a_model_for_it(tiny_engine: LoadTiny) -> None:
    engine = tiny_engine("control")
    status, body = post(engine, prompt="a", suffix="b")

    assert status == 400
    assert body["error"]["param"] == "suffix"
    assert post(engine, prompt="a", suffix="", max_tokens=1)[0] == 200


@pytest.mark.parametrize("name", [*CONTROL, *USER_DEFINED])
def test_names_in_prompts_are_no_control_tokens(name: str, tiny_engine: LoadTiny) -> None:
    """A prompt is plain text. Control tokens can be sent as ids."""
    engine = tiny_engine("control")
    prompts = spied(engine)
    token = engine.tokenize(name, special=True)[0]
    post(engine, prompt=[f"a{name}b", [token]], max_tokens=1)

    assert token not in prompts[0]
    assert prompts[1] == (token,)


def test_bos_goes_in_front_of_text_and_not_of_tokens(tiny_engine: LoadTiny) -> None:
    """As the vocabulary says; ids are taken as they are. The echo shows neither."""
    engine = tiny_engine("llama")
    ids = engine.tokenize("Hi", special=False)
    _, text = post(engine, prompt="Hi", max_tokens=1, echo=True)
    _, tokens = post(engine, prompt=ids, max_tokens=1, echo=True)
    _, empty = post(engine, prompt="", max_tokens=1)

    assert text["usage"]["prompt_tokens"] == len(ids) + 1
    assert tokens["usage"]["prompt_tokens"] == len(ids)
    assert empty["usage"]["prompt_tokens"] == 1
    assert text["choices"][0]["text"].startswith("Hi")
    assert tokens["choices"][0]["text"].startswith("Hi")


def test_best_of_returns_the_likeliest(tiny_engine: LoadTiny) -> None:
    """Of four candidates the two with the highest mean logprob, the best first. All of them count as usage."""
    engine = tiny_engine("control")
    body = {
        "prompt": ["abc", "de"],
        "max_tokens": 8,
        "seed": 3,
        "logprobs": 0,
        "logit_bias": {"257": -100, "259": -100},
    }
    _, every = post(engine, **body, n=4)
    _, best = post(engine, **body, n=2, best_of=4)

    def mean(choice: Any) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    for prompt in (0, 1):
        means = sorted((mean(choice) for choice in every["choices"][4 * prompt : 4 * prompt + 4]), reverse=True)
        found = [mean(choice) for choice in best["choices"][2 * prompt : 2 * prompt + 2]]
        assert found == pytest.approx(means[:2], abs=0.05)
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


def test_best_of_does_not_show_logprobs_that_were_not_asked_for(tiny_engine: LoadTiny) -> None:
    _, body = post(tiny_engine("control"), prompt="abc", max_tokens=4, best_of=2)

    assert [choice["logprobs"] for choice in body["choices"]] == [None]


@pytest.mark.parametrize("kind", ["control", "gemma", "lfm2", "mamba"])
def test_the_echo_has_the_logprobs_of_the_prompt(kind: str, tiny_engine: LoadTiny) -> None:
    """Those of each token are what the model says after the tokens before it, on every kind of memory."""
    engine = tiny_engine(kind)
    prompt = [40 + 7 * index % 200 for index in range(23)]
    _, body = post(engine, prompt=prompt, max_tokens=2, temperature=0, logprobs=3, echo=True)

    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(prompt) + body["usage"]["completion_tokens"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for length in range(1, len(prompt)):
        _, alone = post(engine, prompt=prompt[:length], max_tokens=1, temperature=0, logprobs=3)
        top = alone["choices"][0]["logprobs"]["top_logprobs"][0]
        scored = dict(logprobs["top_logprobs"][length])
        assert scored[logprobs["tokens"][length]] == logprobs["token_logprobs"][length]
        assert {token: scored[token] for token in top if token in scored} == pytest.approx(top, abs=0.02)


def test_prompts_are_scored_together(tiny_engine: LoadTiny) -> None:
    """More prompts than slots, two choices each: the same logprobs as alone, streamed and not, in the echo's place."""
    engine = tiny_engine("control", n_parallel=4)
    prompts = [f"{letter * 9} é <|im_end|> {letter}" for letter in "abcdef"]
    body = {"prompt": prompts, "max_tokens": 3, "temperature": 0, "logprobs": 1, "echo": True, "n": 2}
    _, whole = post(engine, **body)
    _, chunks = post(engine, **body, stream=True)
    streamed = folded(chunks)

    for choice in whole["choices"]:
        prompt = prompts[choice["index"] // 2]
        _, alone = post(engine, **{**body, "prompt": prompt, "n": 1})
        logprobs = choice["logprobs"]
        n_prompt = alone["usage"]["prompt_tokens"]
        assert choice["text"].startswith(prompt)
        assert logprobs["text_offset"][:n_prompt] == alone["choices"][0]["logprobs"]["text_offset"][:n_prompt]
        assert logprobs["token_logprobs"][1:n_prompt] == pytest.approx(
            alone["choices"][0]["logprobs"]["token_logprobs"][1:n_prompt], abs=0.02
        )
        assert streamed[choice["index"]]["text"] == choice["text"]
        assert streamed[choice["index"]]["logprobs"]["tokens"] == logprobs["tokens"]
        assert streamed[choice["index"]]["logprobs"]["text_offset"] == logprobs["text_offset"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith(("bytes:", "<|")) or choice["text"][offset:].startswith(token)


def test_a_scored_prompt_is_not_taken_from_the_cache(tiny_engine: LoadTiny) -> None:
    """The cache has no logits. Later requests reuse what the scored one left."""
    engine = tiny_engine("control")
    body = {"prompt": "the same prompt", "max_tokens": 0}
    post(engine, **body)
    _, scored = post(engine, **body, logprobs=1, echo=True)
    _, again = post(engine, **body)

    assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == scored["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 10


def test_offsets_of_an_echo_begin_with_its_text(tiny_engine: LoadTiny) -> None:
    """BOS has no text, and the space that the vocabulary puts in front is not in the echo."""
    _, body = post(tiny_engine("spaced"), prompt="Hi x", max_tokens=1, logprobs=0, echo=True)
    choice = body["choices"][0]

    offsets = dict(zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True))
    assert choice["logprobs"]["tokens"][0] == "<s>"
    assert choice["text"].startswith("Hi x")
    assert [offsets[place] for place in range(4)] == ["H", "i", " ", "x"]


def test_logprobs_0_are_those_of_the_chosen_tokens(tiny_engine: LoadTiny) -> None:
    engine = tiny_engine("control")
    _, none = post(engine, prompt="abc", max_tokens=4, temperature=0, logprobs=0)
    _, five = post(engine, prompt="abc", max_tokens=4, temperature=0, logprobs=5)

    for answer, count in ((none, 1), (five, 5)):
        logprobs = answer["choices"][0]["logprobs"]
        assert [len(top) for top in logprobs["top_logprobs"]] == [count] * 4
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == logprob == max(top.values())


PIECES = st.sampled_from([b"a", b"ab", b" ", b"\n", "é".encode(), b"\xc3", b"\xa9", b"\xff", b""])


@given(st.lists(PIECES, max_size=20), st.sampled_from([(), ("ab",), ("b\n", "a a"), ("é",)]), st.integers(0, 5))
def test_offsets_are_those_of_the_tokens_in_the_text(pieces: list[bytes], stops: tuple[str, ...], start: int) -> None:
    """Streamed token by token or given at once: the same entries, and each offset is where the token's text begins."""

    def run(step: int) -> tuple[str, wire.Logprobs]:
        stream, offsets = TextStream(stops), Offsets(start)
        text, all_logprobs = "", wire.Logprobs([], [], [], [])
        groups = [pieces[index : index + step] for index in range(0, len(pieces), step)] or [[]]
        for index, group in enumerate(groups):
            last = index == len(groups) - 1
            gained = "".join(stream.push(piece) for piece in group) + (stream.finish() if last else "")
            text += gained
            entries = [TokenLogprob(piece, -1.0) for piece in group]
            part = offsets.push(entries, gained, last=last)
            for name in wire.Logprobs.__struct_fields__:
                getattr(all_logprobs, name).extend(getattr(part, name))
        return text, all_logprobs

    text, streamed = run(1)
    assert (text, streamed) == run(len(pieces) or 1)
    assert streamed.text_offset == sorted(streamed.text_offset)
    for piece, offset in zip(pieces, streamed.text_offset, strict=False):
        assert start <= offset <= start + len(text)
        if b"".join(pieces).isascii():
            assert text[offset - start :].startswith(piece.decode()[: len(text) - (offset - start)])


def test_tokens_that_are_no_characters_show_their_bytes() -> None:
    """Two of them stay two keys of `top_logprobs`."""
    tokens = [TokenLogprob(b"\xc3", -1.0, ((b"\xc3", -1.0), (b"\xa9", -2.0))), TokenLogprob(b"\xa9", -1.0)]
    logprobs = Offsets().push(tokens, "é", last=True)

    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.top_logprobs[0] == {"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}
    assert logprobs.text_offset == [0, 0]


def test_control_tokens_have_a_name_and_no_text() -> None:
    tokens = [TokenLogprob(b"<s>", -1.0, control=True), TokenLogprob(b"a", -1.0)]
    logprobs = Offsets().push(tokens, "a", last=True)

    assert (logprobs.tokens, logprobs.text_offset) == (["<s>", "a"], [0, 0])


def test_the_best_come_first_and_an_empty_answer_last() -> None:
    choices = [Choice(index, str(index)) for index in range(6)]
    best = wire.best(choices, {0: -2.0, 1: -1.0, 4: -3.0, 5: -0.5}, 3, 2)

    assert [(choice.index, choice.text) for choice in best] == [(0, "1"), (1, "0"), (2, "5"), (3, "4")]


def test_a_fold_of_one_chunk_is_that_chunk() -> None:
    usage = {"prompt_tokens": 1}
    chunks = [
        Completion("cmpl-1", 1, "m", [Choice(0, "a", finish_reason="stop")], "fp"),
        Completion("cmpl-1", 1, "m", [], "fp", usage),  # type: ignore[arg-type]
    ]

    assert wire.fold(chunks).choices == [Choice(0, "a", finish_reason="stop")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": ["a", None]}, "prompt[1]"),
        ({"prompt": [["a"]]}, "prompt[0]"),
        ({"prompt": [1, 256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [2**70]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "n": 5}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "best_of": 5}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "logit_bias": {"256": 1}}, "logit_bias"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"prompt": "a", "min_tokens": 3}, "min_tokens"),
        ({"prompt": "a", "guided_regex": "a"}, "guided_regex"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
    ],
)
def test_a_clients_mistake_is_a_400_that_names_the_field(body: Any, param: str) -> None:
    engine = ScriptedEngine()
    status, answer = post(engine, **body)

    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert engine.requests == []


def test_another_model_is_a_404() -> None:
    assert post(ScriptedEngine(), prompt="a", model="gpt-3.5-turbo-instruct")[0] == 404


def test_response_format_holds(tiny_engine: LoadTiny) -> None:
    """A schema constrains a completion as it does a chat."""
    schema = {"enum": ["yes", "no"]}
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    _, body = post(tiny_engine("control"), prompt="Well?", response_format=shape)

    assert json.loads(body["choices"][0]["text"]) in ("yes", "no")
