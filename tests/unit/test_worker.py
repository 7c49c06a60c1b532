"""The engine thread on tiny models: the end, failure or preemption of one sequence does not affect others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from core.engine import llama, schedule
from core.engine.generation import GenerationStream
from core.engine.interface import GenerationRequest, Sampling, Timings
from core.engine.llama import Llama
from core.engine.sampling import Sampler
from core.errors import ApiError, DeadlineExceeded, ModelUnavailable

Load = Callable[..., Llama]

CLOSE = 0.1  # tolerance of logprobs: another batch shape adds floats in another order
GREEDY = Sampling(temperature=0, logit_bias={2: -100.0})  # never ends by itself


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return (1, *(3 + (seed * 31 + index * 7) % 250 for index in range(length - 1)))


def request(seed: int, length: int, max_tokens: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt(seed, length), GREEDY, max_tokens=max_tokens, tenant=str(seed), **fields)


def fixed_text(seed: int, length: int, tokens: int) -> GenerationRequest:
    """Return a request whose grammar fixes the text. Only logprobs can differ, so near ties do not matter."""
    text = "".join(chr(97 + (seed * 5 + index * index) % 26) for index in range(tokens))
    return request(seed, length, tokens, grammar=f'start: "{text}"', top_logprobs=0)


async def logprobs_of(stream: GenerationStream) -> list[float]:
    """Return the logprobs of all tokens before the grammar's mask. They depend on all tokens before."""
    return [entry.logprob async for piece in stream for entry in piece.logprobs]


async def all_logprobs(engine: Llama, *requests: GenerationRequest) -> list[list[float]]:
    return list(await asyncio.gather(*[logprobs_of(engine.generate(request)) for request in requests]))


async def read(stream: GenerationStream) -> tuple[str, int, str | None]:
    text, tokens, finish = "", 0, None
    async for piece in stream:
        text, tokens, finish = text + piece.text, tokens + piece.tokens, piece.finish_reason
    return text, tokens, finish


async def answers_of(engine: Llama, *requests: GenerationRequest) -> list[tuple[str, int, str | None]]:
    return list(await asyncio.gather(*[read(engine.generate(request)) for request in requests]))


class Watched:
    """The bindings with a hook that runs in the engine thread before each decode call."""

    def __init__(self, engine: Llama, before: Callable[[int], None]) -> None:
        scheduler = engine._worker
        self._real = scheduler._bindings
        self._before = before
        self.lengths: list[int] = []  # of the batches
        scheduler._bindings = self

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.lengths.append(batch.n_tokens)
        self._before(batch.n_tokens)
        return int(self._real.llama_decode(context, batch))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("kind", ["llama", "gemma", "lfm2", "mamba"])
def test_cancelling_a_prompt_does_not_disturb_others(kind: str, tiny_engine: Load) -> None:
    """Their logprobs equal those of an undisturbed run, and no token is decoded twice."""
    engine = tiny_engine(kind, n_ctx=4096, n_batch=64)
    others = [fixed_text(seed, 40, 60) for seed in range(3)]
    undisturbed = asyncio.run(all_logprobs(engine, *others))
    fourth: list[GenerationStream] = []

    def before(length: int) -> None:
        if length > 3 and fourth and not fourth[0].cancelled:
            watched.lengths.clear()
            fourth[0].cancel()

    watched = Watched(engine, before)

    async def main() -> list[list[float]]:
        streams = [engine.generate(other) for other in others]
        firsts = [await anext(stream) for stream in streams]
        fourth.append(engine.generate(request(4, 1000, 60)))
        rest = await asyncio.gather(*map(logprobs_of, streams))
        assert await read(fourth[0]) == ("", 0, None)
        return [[first.logprobs[0].logprob, *more] for first, more in zip(firsts, rest, strict=True)]

    disturbed = asyncio.run(main())
    assert [len(logprobs) for logprobs in disturbed] == [60] * 3
    for expected, logprobs in zip(undisturbed, disturbed, strict=True):
        assert expected == pytest.approx(logprobs, abs=CLOSE)
    assert fourth[0].cancelled
    assert engine.stats()["aborted"] == 0
    assert watched.lengths
    assert max(watched.lengths) <= 3


@pytest.mark.parametrize("kind", ["llama", "lfm2", "mamba"])
def test_a_cancelled_prompt_alone_in_its_batch_is_aborted(
    kind: str, tiny_engine: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """It stops at once, and the next request is not affected."""
    engine = tiny_engine(kind, n_batch=64)
    expected = asyncio.run(answers_of(engine, request(1, 40, 20)))
    streams: list[GenerationStream] = []
    Watched(engine, lambda length: streams[0].cancel())

    async def main() -> None:
        streams.append(engine.generate(request(2, 500, 20)))
        assert await read(streams[0]) == ("", 0, None)

    asyncio.run(main())
    assert asyncio.run(answers_of(engine, request(1, 40, 20))) == expected
    assert engine.stats()["aborted"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_failed_decode_is_logged_and_the_next_one_works(tiny_engine: Load, caplog: pytest.LogCaptureFixture) -> None:
    """The log has llama.cpp's message at level ERROR."""
    engine = tiny_engine("llama")
    expected = asyncio.run(answers_of(engine, request(1, 40, 20)))
    broken = [True]

    def before(length: int) -> None:
        if broken.pop() if broken else False:
            engine._worker._batch._positions[0] = 999  # an invalid position

    Watched(engine, before)
    with pytest.raises(ApiError, match="llama_decode returned -1"):
        asyncio.run(answers_of(engine, request(2, 40, 20)))

    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "position" in record.getMessage()
    assert asyncio.run(answers_of(engine, request(1, 40, 20))) == expected


def test_a_deadline_during_prefill_is_an_error(tiny_engine: Load) -> None:
    """There is no token yet, so there is no answer that could end with "length"."""
    engine = tiny_engine("llama", n_batch=64)
    deadline = time.monotonic() + 0.2

    def before(length: int) -> None:
        while time.monotonic() < deadline:
            time.sleep(0.001)

    Watched(engine, before)
    with pytest.raises(DeadlineExceeded, match="before the first token: the prompt has 500 tokens"):
        asyncio.run(answers_of(engine, request(1, 500, 20, deadline=deadline)))


def test_an_exception_ends_one_sequence(
    tiny_engine: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other sequences and later requests are answered, and the log has the traceback."""
    engine = tiny_engine("llama")
    draw = engine._worker._step._draw

    def broken(sequence: Any, matcher: Any, row: int) -> int:
        if sequence.request.tenant == "1":
            raise MemoryError
        return draw(sequence, matcher, row)

    monkeypatch.setattr(engine._worker._step, "_draw", broken)

    async def main() -> list[Any]:
        streams = [engine.generate(request(seed, 20, 10)) for seed in range(3)]
        return await asyncio.gather(*map(read, streams), return_exceptions=True)

    with caplog.at_level(logging.ERROR, "slm.engine"):
        first, failed, third = asyncio.run(main())

    assert (first[1], third[1]) == (10, 10)
    assert isinstance(failed, ApiError)
    assert failed.status == 500
    assert "MemoryError" in caplog.text
    assert engine.failed is None
    assert asyncio.run(answers_of(engine, request(5, 20, 10)))[0][1] == 10


def test_a_failed_engine_thread_fails_all_requests(tiny_engine: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and later requests get a 503, and `failed` is set."""
    engine = tiny_engine("llama")

    def broken() -> int:
        raise RuntimeError("cannot count")

    async def main() -> None:
        stream = engine.generate(request(1, 20, 1000))
        await anext(stream)
        monkeypatch.setattr(engine._worker._cache, "used", broken)
        with pytest.raises(ModelUnavailable, match="engine failed"):
            await answers_of(engine, request(2, 20, 10))
        with pytest.raises(ModelUnavailable, match="engine failed"):
            await read(stream)
        with pytest.raises(ModelUnavailable, match="engine failed"):
            engine.generate(request(3, 20, 10))

    asyncio.run(main())
    assert engine.failed is not None


def test_a_stopped_engine_has_not_failed(tiny_engine: Load) -> None:
    engine = tiny_engine("llama")
    engine.stop()

    assert engine.failed is None
    with pytest.raises(ModelUnavailable, match="released"):
        asyncio.run(answers_of(engine, request(1, 20, 10)))


@pytest.mark.parametrize("kind", ["llama", "gemma", "lfm2"])
def test_a_preempted_sequence_is_prefilled_within_the_budget(
    kind: str, tiny_engine: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are decoded in slices while others decode, and its answer does not change."""
    engine = tiny_engine(kind, n_ctx=512)
    requests = [fixed_text(seed, 100, 120) for seed in range(4)]
    alone = [asyncio.run(all_logprobs(engine, each))[0] for each in requests]
    steps: list[tuple[list[schedule.Running], list[schedule.Rows]]] = []
    real = schedule.fill

    def recorded(running: Any, size: int, prefill: int, outputs: int) -> list[schedule.Rows]:
        rows = real(running, size, 20, outputs)  # as on a slow machine
        steps.append((running, rows))
        return rows

    monkeypatch.setattr(schedule, "fill", recorded)
    before = engine.stats()["preempted"]
    together = asyncio.run(all_logprobs(engine, *requests))

    assert engine.stats()["preempted"] > before
    for expected, logprobs in zip(alone, together, strict=True):
        assert len(expected) == 120
        assert expected == pytest.approx(logprobs, abs=CLOSE)
    for running, rows in steps:
        if any(not sequence.prefilling for sequence in running):
            assert sum(row.count for row in rows if running[row.index].prefilling) <= 20
    assert engine.stats()["sequences"]["running"] == 0


@pytest.mark.parametrize("kind", ["llama", "gemma", "lfm2", "mamba"])
def test_a_cached_prefix_gives_the_same_answer(kind: str, tiny_engine: Load) -> None:
    """Three conversations take turns several times. The KV cells of one do not spoil the prefix of another."""
    engine = tiny_engine(kind)
    requests = [fixed_text(seed, 40, 60) for seed in range(3)]

    async def by_turns() -> list[list[float]]:
        return [(await all_logprobs(engine, each))[0] for each in requests]

    cold = asyncio.run(by_turns())
    for _ in range(3):
        for expected, logprobs in zip(cold, asyncio.run(by_turns()), strict=True):
            assert expected == pytest.approx(logprobs, abs=CLOSE)


def test_prompts_wait_for_kv_cells(tiny_engine: Load) -> None:
    """Four prompts that do not fit together are prefilled in turn, and none is preempted."""
    engine = tiny_engine("llama", n_ctx=256)
    answers = asyncio.run(answers_of(engine, *[request(seed, 100, 20) for seed in range(4)]))

    assert [(tokens, finish) for _, tokens, finish in answers] == [(20, "length")] * 4
    assert engine.stats()["preempted"] == 0


def test_answers_to_one_prompt_share_its_kv_cells(tiny_engine: Load) -> None:
    """Four answers to a prompt of more than a third of the context run at once."""
    engine = tiny_engine("llama", n_ctx=256)
    widths: list[int] = []
    Watched(engine, widths.append)
    stream_request = GenerationRequest(prompt(1, 100), Sampling(seed=1, logit_bias={2: -100.0}), max_tokens=20, n=4)

    async def main() -> int:
        return sum([piece.tokens async for piece in engine.generate(stream_request)])

    assert asyncio.run(main()) == 80
    assert 4 in widths
    assert engine.stats()["preempted"] == 0


def test_a_recurrent_model_is_not_limited_by_kv_cells(tiny_engine: Load) -> None:
    """Its states have a fixed size, so sequences that together exceed the context run at once."""
    engine = tiny_engine("mamba", n_ctx=256)
    widths: list[int] = []
    Watched(engine, widths.append)
    answers = asyncio.run(answers_of(engine, *[request(seed, 150, 20) for seed in range(4)]))

    assert [tokens for _, tokens, _ in answers] == [20] * 4
    assert 4 in widths


def test_a_request_that_cannot_be_built_is_cleaned_up(tiny_engine: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sampler fails. The first is freed, and the deadline's timer is cancelled."""
    engine = tiny_engine("llama")
    made: list[Sampler] = []
    streams: list[GenerationStream] = []

    class Second(Sampler):
        def __init__(self, *args: Any, **fields: Any) -> None:
            if made:
                raise MemoryError
            super().__init__(*args, **fields)
            made.append(self)

    class Stream(GenerationStream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(self)

    monkeypatch.setattr(llama, "Sampler", Second)
    monkeypatch.setattr(llama, "GenerationStream", Stream)

    async def main() -> None:
        with pytest.raises(MemoryError):
            engine.generate(request(1, 20, 10, n=2, deadline=time.monotonic() + 100))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert made[0]._chain is None
    timer = streams[0]._timer
    assert timer is not None
    assert timer.cancelled()


async def last(stream: GenerationStream) -> tuple[str | None, str | None]:
    """Return the finish reason and cause of the last delta, and check that the others have none."""
    *others, end = [delta async for delta in stream]
    assert {(delta.finish_reason, delta.cause) for delta in others} <= {(None, None)}
    return end.finish_reason, end.cause


@pytest.mark.parametrize(
    ("length", "fields", "end"),
    [
        (20, {"max_tokens": 5}, ("length", "max_tokens")),
        (248, {"max_tokens": None}, ("length", "context")),
        (248, {"max_tokens": 1000}, ("length", "context")),
        (248, {"max_tokens": 8}, ("length", "max_tokens")),
        (20, {"max_tokens": 50, "grammar": 'start: "abc"'}, ("stop", None)),
    ],
)
def test_a_cut_answer_says_which_limit_was_reached(
    tiny_engine: Load, length: int, fields: dict[str, Any], end: tuple[str, str | None]
) -> None:
    """If max_tokens and the context end at the same token, it is max_tokens."""
    engine = tiny_engine("llama", n_ctx=256)
    generation_request = GenerationRequest(prompt(1, length), GREEDY, **fields)

    async def main() -> tuple[str | None, str | None]:
        return await last(engine.generate(generation_request))

    assert engine.card.n_ctx == 256
    assert asyncio.run(main()) == end


def test_an_answer_cut_by_its_deadline_has_that_cause(tiny_engine: Load) -> None:
    engine = tiny_engine("llama")
    deadline = time.monotonic() + 3600

    async def main() -> tuple[str | None, str | None]:
        stream = engine.generate(request(1, 20, 1000, deadline=deadline))
        await anext(stream)
        stream._expire()  # as the deadline's timer does
        return await last(stream)

    assert asyncio.run(main()) == ("length", "deadline")


def test_an_answer_cut_by_full_kv_memory_has_that_cause(tiny_engine: Load) -> None:
    """A sequence that runs alone ends when llama.cpp has no KV cell for its next token."""
    engine = tiny_engine("llama")
    full = threading.Event()
    watched = Watched(engine, lambda length: None)
    decode = watched.llama_decode
    watched.llama_decode = lambda context, batch: 1 if full.is_set() else decode(context, batch)  # type: ignore[method-assign]

    async def main() -> tuple[str | None, str | None]:
        stream = engine.generate(request(1, 20, 1000))
        await anext(stream)
        full.set()
        return await last(stream)

    assert asyncio.run(main()) == ("length", "memory")


def test_timings_add_up_to_the_time_of_the_request(tiny_engine: Load) -> None:
    """Queue, prefill and decode follow each other. A long prompt takes several prefill steps."""
    engine = tiny_engine("llama", n_batch=64)
    watched = Watched(engine, lambda length: time.sleep(0.01))

    async def main() -> tuple[Timings, float]:
        started = time.monotonic()
        stream = engine.generate(request(1, 500, 10))
        async for _ in stream:
            pass
        return stream.timings, (time.monotonic() - started) * 1000

    timings, elapsed_ms = asyncio.run(main())
    n_prefill = len([length for length in watched.lengths if length > 1])
    assert n_prefill > 5
    assert timings.queue_ms >= 0
    assert timings.prefill_ms >= 10 * n_prefill
    assert timings.decode_ms >= 10 * 9
    assert timings.queue_ms + timings.prefill_ms + timings.decode_ms <= elapsed_ms
