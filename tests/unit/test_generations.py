"""Several generations as one: bounded, cancelled together, and ended by the first error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.engine.interface import Delta, GenerationRequest
from core.errors import ApiError, Busy, ModelUnavailable
from core.generations import Generations
from tests.fakes import ScriptedEngine

REQUESTS = [GenerationRequest((letter,), n=2) for letter in b"abcde"]


class Failing(ScriptedEngine):
    """Raises errors for the prompts that are in `errors`, once each."""

    def __init__(self, errors: dict[int, ApiError]) -> None:
        super().__init__("x y")
        self.errors = errors

    def generate(self, request: GenerationRequest) -> Any:
        error = self.errors.pop(request.prompt[0], None)
        if error is not None:
            raise error
        return super().generate(request)


async def read(generations: Generations) -> list[Delta]:
    return [delta async for delta in generations]


def test_every_sequence_of_every_request_ends_under_its_own_number() -> None:
    async def go() -> None:
        engine = ScriptedEngine("x y z", cached_tokens=3)
        generations = Generations(engine, REQUESTS)
        deltas = await read(generations)

        texts = {index: "".join(delta.text for delta in deltas if delta.index == index) for index in range(10)}
        assert set(texts.values()) == {"x y z"}
        assert sorted(delta.index for delta in deltas if delta.finish_reason) == list(range(10))
        assert generations.cached_tokens == 3 * len(REQUESTS)
        assert generations.timings.prefill_ms == 2.0
        await asyncio.gather(*generations._lanes)
        assert engine.running == 0

    asyncio.run(go())


def test_cancelling_ends_all_and_starts_no_more() -> None:
    """A client that leaves holds no slot."""

    async def go() -> None:
        engine = ScriptedEngine("x ", endless=True)
        generations = Generations(engine, REQUESTS)
        await anext(generations)
        assert engine.running == engine.config.n_parallel // 2

        generations.cancel()
        generations.cancel()
        assert engine.running == 0
        assert await read(generations) == []
        await asyncio.gather(*generations._lanes)
        assert engine.running == 0
        assert len(engine.requests) == engine.config.n_parallel // 2

    asyncio.run(go())


def test_cancelling_wakes_a_reader() -> None:
    async def go() -> None:
        generations = Generations(ScriptedEngine("x", delay=3600), REQUESTS)
        reader = asyncio.ensure_future(read(generations))
        await asyncio.sleep(0)
        generations.cancel()
        assert await asyncio.wait_for(reader, 10) == []
        for lane in generations._lanes:
            lane.cancel()

    asyncio.run(go())


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_error_of_one_ends_all(place: int) -> None:
    async def go() -> None:
        engine = Failing({REQUESTS[place].prompt[0]: ModelUnavailable("gone")})
        generations = Generations(engine, REQUESTS)
        with pytest.raises(ModelUnavailable, match="gone"):
            await read(generations)
        await asyncio.gather(*generations._lanes)
        assert engine.running == 0

    asyncio.run(go())


def test_only_the_first_request_is_refused_by_a_full_queue() -> None:
    """The others wait until there is room, because the answer has begun."""

    async def go() -> None:
        with pytest.raises(Busy):
            await read(Generations(Failing({ord("a"): Busy("full")}), REQUESTS))

        deltas = await read(Generations(Failing({ord("c"): Busy("full", retry_after=0)}), REQUESTS))
        assert len({delta.index for delta in deltas}) == 10

    asyncio.run(go())


def test_a_request_does_not_wait_for_room_beyond_its_deadline() -> None:
    async def go() -> None:
        late = [GenerationRequest((letter,), deadline=0.0) for letter in b"abcde"]
        with pytest.raises(Busy):
            await read(Generations(Failing({ord("e"): Busy("full")}), late))

    asyncio.run(go())
