"""Schedule: rows of the next batch, admission and preemption, as pure functions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.schedule import RESERVE, Rows, Running, Waiting, admit, fill, make_room

DECODING = Running(pending=1, prefilling=False, growth=1000)
CELLS = 320
MARGIN = CELLS // RESERVE  # 10

running_lists = st.lists(
    st.builds(Running, pending=st.integers(1, 600), prefilling=st.booleans(), repeatable=st.booleans()),
    min_size=1,
    max_size=8,
)


@given(st.lists(st.sampled_from(["decode", "prefill", "score"]), min_size=1, max_size=4), st.integers(1, 300))
def test_prompts_that_are_scored_share_the_logits(kinds: list[str], pending: int) -> None:
    """Each scored token needs logits, each other sequence one; together no more than the context has room for."""
    running = [
        DECODING if kind == "decode" else Running(pending, prefilling=True, scoring=kind == "score") for kind in kinds
    ]
    rows = fill(running, 256, 256, 5)

    logits = [row.count if running[row.index].scoring else int(row.sample) for row in rows]
    assert sum(logits) <= 5
    if kinds == ["score"]:
        assert rows == [Rows(0, min(5, pending), sample=pending <= 5)]


def prefill_of(pending: int, **fields: bool) -> Running:
    return Running(pending, prefilling=True, growth=1000, **fields)


@given(running_lists, st.integers(8, 512), st.integers(1, 512))
def test_a_batch_stays_within_its_limits(running: list[Running], size: int, prefill: int) -> None:
    """It stays within its size and the prefill budget, holds each sequence once and is never empty."""
    rows = fill(running, size, prefill, len(running))

    assert rows
    assert sum(row.count for row in rows) <= size
    assert len({row.index for row in rows}) == len(rows)
    assert all(0 < row.count <= running[row.index].pending for row in rows)
    assert all(row.sample == (row.count == running[row.index].pending) for row in rows)
    if any(not sequence.prefilling for sequence in running):
        assert sum(row.count for row in rows if running[row.index].prefilling) <= prefill


@given(running_lists, st.integers(8, 512), st.integers(1, 512))
def test_every_decoding_sequence_is_in_every_batch(running: list[Running], size: int, prefill: int) -> None:
    """Neither a long prompt nor the forced tokens of another sequence delay its next token."""
    decoding = {index for index, sequence in enumerate(running) if not sequence.prefilling}

    assert decoding <= {row.index for row in fill(running, size, prefill, len(running))}


def test_a_prompt_alone_fills_the_batch() -> None:
    assert fill([prefill_of(1000)], 256, 20, 9) == [Rows(0, 256, sample=False)]


def test_prompts_share_the_prefill_budget() -> None:
    """This applies while a sequence decodes. Prompts are prefilled in the order of admission."""
    rows = fill([prefill_of(12), prefill_of(500), DECODING], 256, 20, 9)

    assert rows == [Rows(2, 1, sample=True), Rows(0, 12, sample=True), Rows(1, 8, sample=False)]


def test_forced_tokens_leave_room_for_the_others() -> None:
    """A long constant of a schema is decoded over several steps."""
    rows = fill([Running(100, prefilling=False), DECODING, DECODING], 8, 20, 9)

    assert rows == [Rows(0, 6, sample=False), Rows(1, 1, sample=True), Rows(2, 1, sample=True)]


def test_the_last_token_of_a_repeatable_prompt_has_its_own_batch() -> None:
    assert fill([prefill_of(30, repeatable=True)], 256, 20, 9) == [Rows(0, 29, sample=False)]
    assert fill([prefill_of(1, repeatable=True)], 256, 20, 9) == [Rows(0, 1, sample=True)]


def test_sequences_are_admitted_in_order() -> None:
    """A large sequence is not overtaken by smaller ones; otherwise it could wait for ever."""
    queue = [Waiting(cells=200, growth=0), Waiting(cells=1, growth=0)]

    assert admit(queue, [DECODING], used=150, cells=CELLS) is None
    assert admit(queue, [DECODING], used=100, cells=CELLS) == 0


def test_a_fork_waits_for_its_parent_but_blocks_no_others() -> None:
    queue = [Waiting(0, 0, blocked=True), Waiting(cells=10, growth=0)]

    assert admit(queue, [DECODING], used=0, cells=CELLS) == 1
    assert admit(queue[:1], [DECODING], used=0, cells=CELLS) is None


@pytest.mark.parametrize(
    ("used", "growth", "place"),
    [
        (CELLS - 100 - 1 - 2 * MARGIN, 1000, 0),  # fits with the next token of the running one and room to grow
        (CELLS - 100 - 1 - 2 * MARGIN + 1, 1000, None),
        (CELLS - 100 - 1 - MARGIN - 3, 3, 0),  # a short answer needs no more room than its own tokens
        (CELLS - 100 - 1 - MARGIN - 2, 3, None),
    ],
)
def test_admission_leaves_room_to_grow(used: int, growth: int, place: int | None) -> None:
    assert admit([Waiting(100, growth)], [DECODING], used, CELLS) == place


def test_prompts_still_in_prefill_count() -> None:
    """Long prompts that do not fit into the KV cells together are not admitted together."""
    waiting = Waiting(cells=150, growth=10)

    assert admit([waiting], [prefill_of(140)], used=0, cells=CELLS) == 0
    assert admit([waiting], [prefill_of(140), prefill_of(20)], used=0, cells=CELLS) is None


def test_a_sequence_alone_is_always_admitted() -> None:
    """Waiting would never give it more room."""
    assert admit([Waiting(CELLS, growth=1000)], [], used=0, cells=CELLS) == 0


def test_a_recurrent_model_has_no_limit_of_cells() -> None:
    """The state of a recurrent model has a fixed size."""
    assert admit([Waiting(10_000, growth=1000)], [DECODING], used=10_000, cells=None) == 0


def test_a_preempted_sequence_is_not_readmitted_at_once() -> None:
    """The others need the cells that it freed. It is admitted when one of them has ended."""
    preempted = Waiting(cells=CELLS // 3, growth=1000)
    others = [DECODING, DECODING]

    assert admit([preempted], others, used=CELLS - CELLS // 3, cells=CELLS) is None
    assert admit([preempted], others[:1], used=CELLS // 3, cells=CELLS) == 0


def test_admission_stops_at_the_first_that_does_not_fit() -> None:
    """Each waiting sequence costs a prefix search."""

    def queue() -> object:
        yield Waiting(CELLS, growth=0)
        raise AssertionError("looked at the second in line")

    assert admit(queue(), [DECODING], used=1, cells=CELLS) is None  # type: ignore[arg-type]


def test_idle_prefixes_are_evicted_before_sequences_are_preempted() -> None:
    """Then the youngest sequence is preempted. A sequence that is alone has filled the context and ends."""
    assert make_room([3, 7, 5], idle=True) == "evict"
    assert make_room([3, 7, 5], idle=False) == 1
    assert make_room([3], idle=False) == "end"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 40))
def test_all_prompts_are_prefilled_in_order(prompts: list[int], prefill: int) -> None:
    """This holds while another sequence decodes."""
    pending, done = list(prompts), []
    for _ in range(sum(prompts) + len(prompts)):
        running = [prefill_of(count) if count else DECODING for count in pending]
        for row in fill([*running, DECODING], 256, prefill, 9):
            if row.index < len(pending) and running[row.index].prefilling:
                pending[row.index] -= row.count
                if not pending[row.index]:
                    done.append(row.index)
        if not any(pending):
            break

    assert not any(pending)
    assert all(first < second for first, second in pairwise(done))
