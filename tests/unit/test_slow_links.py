"""A simulated download over links from 50 kB/s to 1 GB/s ends in time and repeats few requests."""

import pytest

from adapters.transfer.blocks import OVERTAKE_S, Blocks

BLOCK = 2 << 20
LATENCY_S = 0.05


class Lane:
    def __init__(self):
        self.part = None
        self.left = 0.0  # bytes of its block still to come
        self.began = self.requested = self.ready = 0.0
        self.running = False


def assign(lanes, blocks, now):
    """Start lanes, each with a part, up to the number that may be active."""
    running = sum(lane.running for lane in lanes)
    for lane in lanes:
        if lane.running or running >= blocks.active:
            continue
        if lane.part is None and (part := blocks.take(now)) is not None:
            lane.part, lane.left, lane.began = part, blocks.length(part.next), now
        if lane.part is not None:
            lane.running, lane.requested, lane.ready = True, now, now + LATENCY_S
            running += 1


def land(lane, blocks, now):
    """Complete the lane's block and continue with the next one of its part."""
    if blocks.claim(lane.part.next):
        blocks.landed(lane.part.next)
    lane.part.next += 1
    blocks.moved(lane.part, now, now - lane.began)
    lane.began = lane.requested = now
    if lane.part.next == lane.part.end:
        lane.part, lane.running = None, False
    else:
        lane.left = blocks.length(lane.part.next)


def simulate(rate, width, size, dripping=0):
    """Return (seconds, bytes sent). Lanes share the link equally, but the first `dripping` lanes get 100 B/s each."""
    blocks = Blocks(size, BLOCK, part_bytes=4 * BLOCK, width=width)
    lanes = [Lane() for _ in range(width)]
    slow = set(lanes[:dripping])
    now = sent = 0.0
    while not blocks.complete():
        assign(lanes, blocks, now)
        running = [lane for lane in lanes if lane.running]
        moving = [lane for lane in running if lane.ready <= now]
        fast = [lane for lane in moving if lane not in slow]
        speed = {lane: 100.0 if lane in slow else rate / len(fast) for lane in moving}
        waits = [lane.left / speed[lane] if lane in speed else lane.ready - now for lane in running]
        waits += [lane.requested + blocks.patience() - now for lane in running]
        step = max(1e-6, min([*waits, OVERTAKE_S / 4]))
        now += step
        assert now < 1e6
        for lane in moving:
            brought = min(lane.left, speed[lane] * step)
            lane.left -= brought
            sent += brought
        for lane in moving:
            if lane.left < 1e-3:
                land(lane, blocks, now)
            elif now - lane.requested >= blocks.patience():
                lane.running = False  # cut; the received part of its block stays
                slow.discard(lane)
                blocks.slowed(now)
    return now, sent


@pytest.mark.parametrize("width", [1, 2, 8, 16])
@pytest.mark.parametrize("rate", [50e3, 200e3, 1e6, 10e6, 100e6, 1e9])
def test_every_link_finishes_in_time(rate, width):
    """A download takes little longer than its bytes need and repeats few of them."""
    size = 24 * BLOCK
    seconds, sent = simulate(rate, width, size)

    assert seconds < 1.25 * size / rate + 40 * LATENCY_S
    assert sent < 1.2 * size


@pytest.mark.parametrize("rate", [200e3, 1e6, 100e6])
def test_dripping_connections_do_not_stop_a_download(rate):
    """Three of eight connections drip. They are overtaken or cut."""
    size = 24 * BLOCK
    seconds, sent = simulate(rate, 8, size, dripping=3)

    assert seconds < 2 * size / rate + 60
    assert sent < 1.4 * size


def test_a_slow_link_has_fewer_requests_than_a_fast_one():
    """If no block lands for long, the number of requests is halved; blocks that land quickly raise it again."""
    blocks = Blocks(100 * BLOCK, BLOCK, width=8)
    part = blocks.take(0.0)
    blocks.slowed(1.0)
    assert blocks.active == 8
    for now in (31.0, 32.0, 62.0, 93.0, 124.0):
        blocks.slowed(now)
    assert blocks.active == 1
    blocks.moved(part, 130.0, 20.0)
    assert blocks.active == 1
    for _ in range(9):
        blocks.moved(part, 131.0, 1.0)
    assert blocks.active == 8
