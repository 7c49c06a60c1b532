"""The benchmark's arithmetic: tokens and times of a stream, ratios, goals."""

import ast
from pathlib import Path

import pytest

from infra.bench import report
from infra.bench.__main__ import names
from infra.bench.client import RequestFailed, parsed


def event(text: str) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": null}]}\n\n' % text.encode()


END = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "%s"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 5}}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_a_delta_has_the_time_of_the_read_that_completed_it() -> None:
    """An event that arrives in two reads has the time of the second."""
    whole = event("b")
    reads = [(1.0, event("a") + whole[:20]), (2.0, whole[20:]), (3.0, b": ping\n\n" + END % b"stop" + DONE)]

    answer = parsed(reads, begun=0.0, max_tokens=9)

    assert (answer.text, answer.first, answer.last, answer.end, answer.deltas) == ("ab", 1.0, 2.0, 3.0, 2)


@pytest.mark.parametrize(
    ("tail", "tokens"),
    [(END % b"stop" + USAGE, 7), (END % b"length", 9), (END % b"stop", 2)],
    ids=["usage", "length", "deltas"],
)
def test_tokens_come_from_usage_else_max_tokens_else_deltas(tail: bytes, tokens: int) -> None:
    """The reported usage takes precedence over max_tokens (if it was reached) and the number of deltas."""
    answer = parsed([(1.0, event("a")), (2.0, event("b") + tail + DONE)], begun=0.0, max_tokens=9)

    assert tokens == answer.tokens


def test_an_error_in_a_stream_fails_the_request() -> None:
    """An interrupted answer would look fast."""
    with pytest.raises(RequestFailed, match="overloaded"):
        parsed([(1.0, event("a") + b'data: {"error": {"message": "overloaded"}}\n\n' + DONE)], begun=0.0, max_tokens=9)


def test_ratios_are_computed_per_round() -> None:
    """A slow round slows both servers, so its ratio is stable; a ratio of medians is not."""
    ours = [{"start_s": 1.0}, {"start_s": 10.0}, {"start_s": 3.0}]
    theirs = [{"start_s": 2.0}, {"start_s": 20.0}, {"start_s": 4.0}]

    assert report.ratios(ours, theirs) == {"start_s": {"median": 0.5, "min": 0.5, "max": 0.75}}


def test_a_goal_is_an_upper_or_a_lower_bound() -> None:
    """Times must stay below their goal, rates above."""
    numbers = {"start_s": {"median": 0.3}, "decode_1_tok_s": {"median": 1.0}}

    goals = {"start_s": report.Goal("most", 0.35), "decode_1_tok_s": report.Goal("least", 1.1)}

    judged = report.judged(numbers, goals)

    assert {name: verdict["met"] for name, verdict in judged.items()} == {"start_s": True, "decode_1_tok_s": False}


def test_names_lists_the_modules_with_a_main() -> None:
    """Benchmarks have a `main(argv)`; modules that they share do not."""
    folder = Path(report.__file__).parent
    runnable = {
        path.stem
        for path in folder.glob("[!_]*.py")
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)
    }

    assert set(names()) == runnable
    assert "server" in runnable
