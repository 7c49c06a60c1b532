"""The budget for the bodies of all running requests."""

from __future__ import annotations

import asyncio

import pytest

from adapters.serving import bodies
from adapters.serving.bodies import BUDGET_FACTOR, UNCOUNTED_BYTES, Budget
from core.errors import Busy

LIMIT = 1 << 20
LARGE = LIMIT + UNCOUNTED_BYTES  # counts as LIMIT bytes


def test_bodies_share_a_multiple_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused with a time to retry, a small one is not, and the end of a request makes room."""
    monkeypatch.setattr(bodies, "WAIT_S", 0.0)

    async def main() -> None:
        budget = Budget(LIMIT)
        held = [budget.reservation() for _ in range(BUDGET_FACTOR)]
        for reservation in held:
            await reservation.reserve(LARGE)
        late = budget.reservation()
        with pytest.raises(Busy) as caught:
            await late.reserve(UNCOUNTED_BYTES + 1)
        assert caught.value.retry_after is not None
        await late.reserve(UNCOUNTED_BYTES)
        held[0].release()
        held[0].release()  # counts once
        await late.reserve(LARGE)
        with pytest.raises(Busy):
            await budget.reservation().reserve(UNCOUNTED_BYTES + 1)
        for reservation in (*held, late):
            reservation.release()
        assert budget.used == 0

    asyncio.run(main())


def test_a_body_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as soon as another request ends. A client that leaves meanwhile takes no room."""
    monkeypatch.setattr(bodies, "WAIT_S", 60.0)

    async def main() -> None:
        budget = Budget(LIMIT)
        first = budget.reservation()
        await first.reserve(UNCOUNTED_BYTES + BUDGET_FACTOR * LIMIT)
        waiting = [asyncio.ensure_future(budget.reservation().reserve(LARGE)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting, timeout=0)
        assert [task.done() for task in waiting] == [True, False, False]
        first.release()
        await asyncio.gather(*waiting[1:])
        assert budget.used == 2 * LIMIT

    asyncio.run(main())


def test_a_body_of_unknown_length_is_counted_as_it_grows() -> None:
    """Each chunk adds what it has; a length that was declared is not counted twice."""

    async def main() -> None:
        budget = Budget(LIMIT)
        reservation = budget.reservation()
        for size in (1000, UNCOUNTED_BYTES, UNCOUNTED_BYTES + 10, UNCOUNTED_BYTES + 10, UNCOUNTED_BYTES + 30):
            await reservation.reserve(size)
        assert budget.used == 30

    asyncio.run(main())
