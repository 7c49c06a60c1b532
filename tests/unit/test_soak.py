"""The soak test's arithmetic: its summary of good and bad runs."""

import pytest

from infra.bench.soak import Sample, Soak, lows, slope, summary


def test_a_slope_is_per_ten_minutes() -> None:
    """1 MiB per second is 600 in ten minutes. Two points give no slope."""
    assert slope([(float(at), 100.0 + at) for at in range(10)]) == 600
    assert slope([(float(at), 100.0) for at in range(10)]) == 0
    assert slope([(0.0, 1.0), (1.0, 2.0)]) is None


def test_a_swap_does_not_count_as_growth() -> None:
    """Two models are in memory for a moment; only the lowest values count."""
    points = [(float(at), 200.0 if at % 60 < 20 else 100.0) for at in range(1200)]

    assert slope(lows(points)) == 0
    assert len(lows(points)) == 20
    assert len(lows(points[:100])) == 10


def finished_soak(*, leases: int | None = 0) -> Soak:
    soak = Soak(port=1, pid=1, seed=1)
    soak.samples = [Sample(at * 10.0, 100.0 + at, 50.0, 20, 9, 3, 5.0) for at in range(7)]
    soak.samples.append(Sample(70.0, 107.0, 50.0, 20, 9, leases, None))
    return soak


def test_the_summary_of_a_good_run() -> None:
    """The first quarter is warm-up. Unanswered /health requests are counted."""
    result = summary(finished_soak(), exit_status=0)

    assert result["failures"] == []
    assert result["rss_mib"] == {"least": 102.0, "most": 107.0, "last": 107.0, "per_10_min": 60.0}
    assert result["health_ms"] == {"p50": 5.0, "p99": 5.0}
    assert result["health_unanswered"] == 1


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda soak: setattr(soak.tally, "lost", 1), "requests were lost"),
        (lambda soak: setattr(soak.tally, "cut", 1), "streams were cut"),
        (lambda soak: soak.tally.statuses.update([500]), "answers were a 500"),
        (lambda soak: soak.tally.wrong_reloads.append("a.gguf: 503"), "reloads went wrong"),
    ],
)
def test_errors_are_failures(break_it: object, words: str) -> None:
    soak = finished_soak()
    break_it(soak)  # type: ignore[operator]

    assert summary(soak, exit_status=0)["failures"] == [words]


@pytest.mark.parametrize("leases", [1, None])
def test_a_lease_left_at_the_end_is_a_failure(leases: int | None) -> None:
    """An unknown number of leases is a failure, too."""
    assert summary(finished_soak(leases=leases), exit_status=-9)["failures"] == [
        "leases were not released",
        "the server did not exit with 0",
    ]
