"""Blocks: every byte is requested once and in order; late blocks are requested again."""

from hypothesis import given
from hypothesis import strategies as st

from adapters.transfer.blocks import Blocks, Part

sizes = st.integers(0, 10_000)
lengths = st.integers(1, 300)


def take_all(blocks, now=0.0):
    parts = []
    while (part := blocks.take(now)) is not None:
        parts.append(part)
    return parts


@given(sizes, lengths, st.integers(0, 12_000), st.integers(0, 3000), st.integers(1, 9))
def test_parts_cover_the_object(size, block_bytes, first_bytes, part_bytes, width):
    """The parts cover every byte once, in order, and are complete when all have landed."""
    blocks = Blocks(size, block_bytes, first_bytes=first_bytes, part_bytes=part_bytes, width=width)
    requested = [block for part in take_all(blocks) for block in range(part.next, part.end)]

    assert requested == list(range(blocks.count))
    assert sum(blocks.length(block) for block in requested) == size
    for block in requested:
        assert blocks.claim(block)
        blocks.landed(block)
    assert blocks.complete()
    assert blocks.arrived == size


@given(sizes, lengths, st.randoms(), st.data())
def test_resume_requests_missing_blocks(size, block_bytes, random, data):
    """Blocks that have already landed, in any order, are not requested again."""
    blocks = Blocks(size, block_bytes, part_bytes=block_bytes * 4, width=2)
    present = data.draw(st.sets(st.integers(0, max(0, blocks.count - 1)))) if blocks.count else set()
    for block in random.sample(sorted(present), len(present)):
        blocks.landed(block)
    requested = [block for part in take_all(blocks) for block in range(part.next, part.end)]

    assert requested == [block for block in range(blocks.count) if block not in present]


@given(sizes.filter(bool), lengths, st.integers(0, 12_000))
def test_before_counts_the_blocks_of_the_first_bytes(size, block_bytes, offset):
    """`before(n)` blocks hold the first n bytes, and one fewer do not."""
    blocks = Blocks(size, block_bytes)
    count = blocks.before(offset)

    assert blocks.offset(count) >= min(offset, size)
    assert count == 0 or blocks.offset(count - 1) < min(offset, size)


def test_the_first_bytes_are_requested_in_single_blocks():
    """The header is needed first; the rest is requested in larger parts."""
    blocks = Blocks(1000, 1, first_bytes=3, part_bytes=10, width=2)

    assert [Part(0, 1), Part(1, 2), Part(2, 3), Part(3, 13)] == [blocks.take(0.0) for _ in range(4)]


def test_parts_shrink_towards_the_end():
    """Near the end parts get smaller, so that all threads finish together."""
    parts = take_all(Blocks(64, 1, part_bytes=8, width=4))
    lengths = [part.end - part.next for part in parts]

    assert lengths[0] == 8
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-8:] == [1] * 8


def test_a_late_block_is_requested_again():
    """A block outstanding for too long is given to an idle thread as well; the first complete copy is written."""
    blocks = Blocks(2, 1, width=2)
    take_all(blocks, now=100.0)
    blocks.landed(1)

    assert blocks.take(100.5) is None
    assert blocks.take(101.5) == Part(0, 1)
    assert blocks.take(101.6) is None
    assert blocks.claim(0)
    assert not blocks.claim(0)


def test_patience_grows_on_a_slow_network():
    """If every block is slow, none of them is late, and no byte is requested twice."""
    blocks = Blocks(4, 1, part_bytes=4, width=1)
    part = blocks.take(0.0)
    rest = take_all(blocks, now=0.0)
    blocks.landed(0)
    blocks.moved(Part(part.next + 1, part.end), now=10.0, seconds=10.0)

    assert rest
    assert blocks.take(30.0) is None
    assert blocks.take(45.0) is not None
