"""Summarize benchmark rounds: medians with their spread, ratios within rounds, and targets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """A target for the median of a metric."""

    kind: Literal["most", "least"]
    value: float

    def met(self, number: float) -> bool:
        return number <= self.value if self.kind == "most" else number >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.kind == 'most' else '>='} {self.value:g}"


# This server against the baseline server (with our settings), and with a schema against without.
RATIO_GOALS = {
    "start_s": Goal("most", 0.35),
    "decode_1_tok_s": Goal("least", 1.1),
    "decode_4_tok_s": Goal("least", 2.5),
}
OWN_GOALS = {"constrained_free_text_x": Goal("most", 1.4), "constrained_structure_x": Goal("most", 1.4)}

Rounds = Sequence[Mapping[str, float]]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": _short(median(values)), "min": _short(min(values)), "max": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def summary(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Return median, minimum and maximum of each metric."""
    names = dict.fromkeys(name for metrics in rounds for name in metrics)
    return {name: spread([metrics[name] for metrics in rounds if name in metrics]) for name in names}


def ratios(ours: Rounds, theirs: Rounds) -> dict[str, dict[str, float]]:
    """Return ours / theirs per metric. Ratios are computed within a round, so that a slow round affects both sides."""
    pairs = list(zip(ours, theirs, strict=True))
    names = [name for name in dict.fromkeys(name for metrics in ours for name in metrics) if not name.endswith("_x")]
    spreads = {}
    for name in names:
        values = [a[name] / b[name] for a, b in pairs if name in a and b.get(name)]
        if values:
            spreads[name] = spread(values)
    return spreads


def judged(numbers: Mapping[str, Mapping[str, float]], goals: Mapping[str, Goal]) -> dict[str, dict[str, Any]]:
    """Return the metrics that have a target, with the target and whether the median meets it."""
    return {
        name: {**numbers[name], "goal": str(goal), "met": goal.met(numbers[name]["median"])}
        for name, goal in goals.items()
        if name in numbers
    }


def line(values: Mapping[str, Any]) -> None:
    """Print one JSON line on standard output."""
    print(json.dumps(values), flush=True)


def table(title: str, columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a text table of medians with (min-max): one row per metric, one column per server."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[title, *columns]]
    for name in names:
        cells = [column.get(name) for column in columns.values()]
        rows.append([name, *("-" if c is None else f"{c['median']:g} ({c['min']:g}-{c['max']:g})" for c in cells)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
