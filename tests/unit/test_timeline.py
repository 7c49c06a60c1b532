"""Timeline: the phases of a start."""

import time

from core.timeline import Timeline


def test_a_restored_process_restarts_the_timeline() -> None:
    """The phases before the snapshot belong to another start."""
    timeline = Timeline(time.monotonic() - 86400)
    with timeline.phase("imports"):
        pass
    assert timeline.now() > 86000

    timeline.restart()
    with timeline.phase("restore"):
        pass

    assert timeline.now() < 60
    assert list(timeline.report()) == ["restore"]
