"""The timeline of a start."""

import time

from core.timeline import Timeline


def test_a_restored_process_begins_anew() -> None:
    """The phases of the start that was snapshot belong to another machine and another day."""
    timeline = Timeline(time.monotonic() - 86400)
    with timeline.phase("imports"):
        pass
    assert timeline.now() > 86000

    timeline.restart()
    with timeline.phase("restore"):
        pass

    assert timeline.now() < 60
    assert list(timeline.report()) == ["restore"]
