"""Cache: which slot a sequence gets, and how much of its prompt is cached."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.cache import Cache, common_prefix
from core.engine.generation import Sequence
from core.engine.interface import GenerationRequest


class Memory:
    """A fake of llama.cpp's memory calls. `partial=False` refuses to truncate a sequence, as a recurrent model does."""

    def __init__(self, partial: bool = True) -> None:
        self.partial = partial
        self.copies: list[tuple[int, int, int]] = []
        self.oldest = 0

    def llama_memory_seq_pos_min(self, memory: Any, slot: int) -> int:
        return self.oldest

    def llama_get_memory(self, context: Any) -> None:
        return None

    def llama_memory_seq_rm(self, memory: Any, slot: int, start: int, end: int) -> bool:
        return self.partial or start <= 0

    def llama_memory_seq_cp(self, memory: Any, source: int, target: int, start: int, end: int) -> None:
        self.copies.append((source, target, end))


def sequence(tokens: list[int], tenant: str = "") -> Sequence:
    request = GenerationRequest(tuple(tokens), tenant=tenant)
    return Sequence(request, 0, None, None, None, None)  # type: ignore[arg-type]


def serve(cache: Cache, tokens: list[int], answer: list[int], tenant: str = "") -> int:
    """Run one request from start to end and return the number of cached tokens."""
    served = sequence(tokens, tenant)
    cached = cache.take(served)
    assert served.slot is not None
    served.slot.tokens = tokens + answer
    cache.release(served)
    return cached


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    """The result equals that of a plain loop."""
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    assert expected == common_prefix(a, b)


def test_the_next_turn_reuses_the_whole_conversation() -> None:
    """Prompt and answer stay in the slot for a request that begins with both."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 2, 3], [4, 5])

    assert serve(cache, [1, 2, 3, 4, 5, 6, 7], []) == 5


def test_the_same_prompt_leaves_one_token_to_decode() -> None:
    """Without a decoded token there are no logits to sample from."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 2, 3], [4])

    assert serve(cache, [1, 2, 3], [4]) == 2


def test_another_tenant_never_gets_the_prefix() -> None:
    """Otherwise `cached_tokens` and timing would reveal one client's prompts to another."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 2, 3], [4], tenant="a")

    assert serve(cache, [1, 2, 3], [4], tenant="b") == 0


def test_a_short_shared_prefix_is_copied() -> None:
    """Sharing a system prompt must not evict another conversation's history."""
    memory = Memory()
    cache = Cache(memory, None, 2, trimmable=True)
    long = [1, 2, *range(100, 140)]
    serve(cache, long, [])
    serve(cache, [1, 2, 9, 9], [])

    assert memory.copies == [(0, 1, 2)]
    assert len(long) - 1 == serve(cache, long, [])


def test_a_busy_slot_shares_its_prefix_by_copy() -> None:
    """Two requests with one system prompt at once: the second takes the cells, not the slot."""
    memory = Memory()
    cache = Cache(memory, None, 2, trimmable=True)
    first, second = sequence([1, 2, 3, 4]), sequence([1, 2, 3, 5])
    cache.take(first)
    assert first.slot is not None
    first.slot.tokens = [1, 2, 3, 4]

    assert cache.take(second) == 3
    assert first.slot is not second.slot


def test_the_least_recently_used_prefix_is_overwritten() -> None:
    """This applies when all slots are in use."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 1, 1], [])
    serve(cache, [2, 2, 2], [])
    serve(cache, [3, 3, 3], [])

    assert [slot.tokens for slot in cache.slots] == [[3, 3, 3], [2, 2, 2]]


def test_evict_removes_idle_prefixes_only() -> None:
    """A running sequence is never evicted."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 1, 1], [])
    running = sequence([2, 2])
    cache.take(running)
    assert running.slot is not None
    running.slot.tokens = [2, 2]

    assert cache.holds_idle()
    cache.evict()
    assert not cache.holds_idle()
    assert running.slot.tokens == [2, 2]


@pytest.mark.parametrize(("following", "cached"), [([1, 2, 3, 4], 3), ([1, 2, 9], 0)])
def test_a_recurrent_model_reuses_a_slot_only_as_a_whole(following: list[int], cached: int) -> None:
    """Its state cannot be truncated."""
    cache = Cache(Memory(partial=False), None, 2, trimmable=False)
    serve(cache, [1, 2, 3], [])

    assert cached == serve(cache, following, [])


def test_cells_are_counted_once() -> None:
    """A copied prefix shares its KV cells. Tokens after it need their own, also after the source was truncated."""
    cache = Cache(Memory(), None, 3, trimmable=True)
    first, second, third = sequence([*range(10)]), sequence([0, 1, 2, 3, 50, 51]), sequence([0, 1, 2, 3, 50, 60])
    assert cache.needed(first) == 10
    cache.take(first)
    assert first.slot is not None
    first.slot.tokens = [*range(10)]

    assert cache.needed(second) == 2
    cache.take(second)
    assert second.slot is not None
    second.slot.tokens += [50, 51]
    assert cache.used() == 12

    assert cache.needed(third) == 1  # four tokens of the first, one of the second
    cache.take(third)
    assert third.slot is not None
    third.slot.tokens += [60]
    assert cache.used() == 13

    cache.trim(first.slot, 2)
    first.slot.tokens += [70, 71]
    assert cache.used() == 9  # 0 1 2 3 50 51, 60, 70 71

    cache.clear(first.slot)
    assert cache.used() == 7


def test_an_idle_prefix_counts_only_when_it_is_used() -> None:
    """Until then it may be evicted, so its cells are not counted as used."""
    cache = Cache(Memory(), None, 2, trimmable=True)
    serve(cache, [1, 2, 3], [4])

    assert cache.used() == 0
    assert cache.needed(sequence([1, 2, 3, 4, 5])) == 5


@pytest.mark.parametrize(("oldest", "cached"), [(0, 6), (3, 6), (4, 0)])
def test_a_prefix_is_reused_only_if_its_window_is_cached(oldest: int, cached: int) -> None:
    """With a window of 4, the seventh token attends to tokens four to six, which may have been overwritten."""
    memory = Memory()
    cache = Cache(memory, None, 1, trimmable=True, window=4)
    serve(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9], [10])
    memory.oldest = oldest

    assert serve(cache, [1, 2, 3, 4, 5, 6, 50], []) == cached
