"""The soak's arithmetic: what it would say of a run that went well, and of one that did not."""

import pytest

from infra.bench.soak import Sample, Soak, lows, slope, summary


def test_a_slope_is_per_ten_minutes() -> None:
    """1 MiB a second is 600 in ten minutes; two points are no line."""
    assert slope([(float(at), 100.0 + at) for at in range(10)]) == 600
    assert slope([(float(at), 100.0) for at in range(10)]) == 0
    assert slope([(0.0, 1.0), (1.0, 2.0)]) is None


def test_a_swap_is_no_growth() -> None:
    """Two models are in memory for a moment; what counts is what remains."""
    points = [(float(at), 200.0 if at % 60 < 20 else 100.0) for at in range(1200)]

    assert slope(lows(points)) == 0
    assert len(lows(points)) == 20
    assert len(lows(points[:100])) == 10


def soaked(*, leases: int | None = 0) -> Soak:
    soak = Soak(port=1, pid=1, seed=1)
    soak.samples = [Sample(at * 10.0, 100.0 + at, 50.0, 20, 9, 3, 5.0) for at in range(7)]
    soak.samples.append(Sample(70.0, 107.0, 50.0, 20, 9, leases, None))
    return soak


def test_a_run_that_went_well() -> None:
    """The first quarter is warm-up; a /health without an answer is counted."""
    found = summary(soaked(), exit_status=0)

    assert found["failures"] == []
    assert found["rss_mib"] == {"least": 102.0, "most": 107.0, "last": 107.0, "per_10_min": 60.0}
    assert found["health_ms"] == {"p50": 5.0, "p99": 5.0}
    assert found["health_unanswered"] == 1


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda soak: setattr(soak.tally, "lost", 1), "requests were lost"),
        (lambda soak: setattr(soak.tally, "cut", 1), "streams were cut"),
        (lambda soak: soak.tally.statuses.update([500]), "answers were a 500"),
        (lambda soak: soak.tally.wrong_reloads.append("a.gguf: 503"), "reloads went wrong"),
    ],
)
def test_what_must_not_happen_is_a_failure(break_it: object, words: str) -> None:
    soak = soaked()
    break_it(soak)  # type: ignore[operator]

    assert summary(soak, exit_status=0)["failures"] == [words]


@pytest.mark.parametrize("leases", [1, None])
def test_a_lease_that_is_out_at_the_end_is_a_failure(leases: int | None) -> None:
    """Also if nobody could say how many there are."""
    assert summary(soaked(leases=leases), exit_status=-9)["failures"] == [
        "leases were not released",
        "the server did not exit with 0",
    ]
