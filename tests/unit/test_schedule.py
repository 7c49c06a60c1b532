"""Schedule: who gets which rows of the next batch, who is admitted, who gives way. Data only."""

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


def reader(pending: int, **fields: bool) -> Running:
    return Running(pending, prefilling=True, growth=1000, **fields)


@given(running_lists, st.integers(8, 512), st.integers(1, 512))
def test_a_batch_holds_no_more_than_it_may(running: list[Running], size: int, prefill: int) -> None:
    """Within its size and the prefill budget, each sequence once, and something for whoever is first in line."""
    rows = fill(running, size, prefill)

    assert rows
    assert sum(row.count for row in rows) <= size
    assert len({row.index for row in rows}) == len(rows)
    assert all(0 < row.count <= running[row.index].pending for row in rows)
    assert all(row.sample == (row.count == running[row.index].pending) for row in rows)
    if any(not sequence.prefilling for sequence in running):
        assert sum(row.count for row in rows if running[row.index].prefilling) <= prefill


@given(running_lists, st.integers(8, 512), st.integers(1, 512))
def test_every_sequence_that_decodes_is_in_every_batch(running: list[Running], size: int, prefill: int) -> None:
    """Neither a long prompt nor another's forced tokens keep one from its next token."""
    decoding = {index for index, sequence in enumerate(running) if not sequence.prefilling}

    assert decoding <= {row.index for row in fill(running, size, prefill)}


def test_a_prompt_alone_fills_the_batch() -> None:
    assert fill([reader(1000)], 256, 20) == [Rows(0, 256, sample=False)]


def test_beside_a_decoding_sequence_prompts_get_their_slice() -> None:
    """Those admitted first are read first; two prompts share one slice."""
    rows = fill([reader(12), reader(500), DECODING], 256, 20)

    assert rows == [Rows(2, 1, sample=True), Rows(0, 12, sample=True), Rows(1, 8, sample=False)]


def test_forced_tokens_leave_room_for_the_others() -> None:
    """A long constant of a schema is decoded over several steps rather than at the others' cost."""
    rows = fill([Running(100, prefilling=False), DECODING, DECODING], 8, 20)

    assert rows == [Rows(0, 6, sample=False), Rows(1, 1, sample=True), Rows(2, 1, sample=True)]


def test_a_repeatable_prompts_last_token_goes_alone() -> None:
    assert fill([reader(30, repeatable=True)], 256, 20) == [Rows(0, 29, sample=False)]
    assert fill([reader(1, repeatable=True)], 256, 20) == [Rows(0, 1, sample=True)]


def test_first_come_first_admitted() -> None:
    """A sequence that lacks room is not overtaken by smaller ones, or it would wait for ever."""
    queue = [Waiting(cells=200, growth=0), Waiting(cells=1, growth=0)]

    assert admit(queue, [DECODING], used=150, cells=CELLS) is None
    assert admit(queue, [DECODING], used=100, cells=CELLS) == 0


def test_a_fork_waits_for_its_parent_and_lets_others_pass() -> None:
    queue = [Waiting(0, 0, blocked=True), Waiting(cells=10, growth=0)]

    assert admit(queue, [DECODING], used=0, cells=CELLS) == 1
    assert admit(queue[:1], [DECODING], used=0, cells=CELLS) is None


@pytest.mark.parametrize(
    ("used", "growth", "place"),
    [
        (CELLS - 100 - 1 - 2 * MARGIN, 1000, 0),  # fits with what the running one decodes next and room to grow
        (CELLS - 100 - 1 - 2 * MARGIN + 1, 1000, None),
        (CELLS - 100 - 1 - MARGIN - 3, 3, 0),  # an answer that is known to be short needs no more than that
        (CELLS - 100 - 1 - MARGIN - 2, 3, None),
    ],
)
def test_admission_leaves_room_to_grow(used: int, growth: int, place: int | None) -> None:
    assert admit([Waiting(100, growth)], [DECODING], used, CELLS) == place


def test_what_is_still_to_be_read_counts() -> None:
    """Four long prompts that cannot lie in the cells together are not admitted together."""
    waiting = Waiting(cells=150, growth=10)

    assert admit([waiting], [reader(140)], used=0, cells=CELLS) == 0
    assert admit([waiting], [reader(140), reader(20)], used=0, cells=CELLS) is None


def test_a_sequence_alone_is_always_admitted() -> None:
    """Nobody else will ever make room for it."""
    assert admit([Waiting(CELLS, growth=1000)], [], used=0, cells=CELLS) == 0


def test_without_cells_there_is_no_limit() -> None:
    """A recurrent model's state has one size, whatever it has read."""
    assert admit([Waiting(10_000, growth=1000)], [DECODING], used=10_000, cells=None) == 0


def test_a_preempted_sequence_does_not_come_back_at_once() -> None:
    """The cells that its pause has freed are those the others need; it fits when one of them has ended."""
    preempted = Waiting(cells=CELLS // 3, growth=1000)
    others = [DECODING, DECODING]

    assert admit([preempted], others, used=CELLS - CELLS // 3, cells=CELLS) is None
    assert admit([preempted], others[:1], used=CELLS // 3, cells=CELLS) == 0


def test_admission_looks_no_further_than_it_must() -> None:
    """Each look costs a search for a prefix."""

    def queue() -> object:
        yield Waiting(CELLS, growth=0)
        raise AssertionError("looked at the second in line")

    assert admit(queue(), [DECODING], used=1, cells=CELLS) is None  # type: ignore[arg-type]


def test_who_makes_room() -> None:
    """An idle prefix, then the youngest; one that is alone has filled the context."""
    assert make_room([3, 7, 5], idle=True) == "evict"
    assert make_room([3, 7, 5], idle=False) == 1
    assert make_room([3], idle=False) == "end"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 40))
def test_all_prompts_are_read_in_the_end(prompts: list[int], prefill: int) -> None:
    """Step after step beside one that decodes: every prompt is read, in the order of admission."""
    pending, done = list(prompts), []
    for _ in range(sum(prompts) + len(prompts)):
        running = [reader(count) if count else DECODING for count in pending]
        for row in fill([*running, DECODING], 256, prefill):
            if row.index < len(pending) and running[row.index].prefilling:
                pending[row.index] -= row.count
                if not pending[row.index]:
                    done.append(row.index)
        if not any(pending):
            break

    assert not any(pending)
    assert all(first < second for first, second in pairwise(done))
