"""Report: medians with their spread, ratios round by round, and the goals they are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """What a number must reach."""

    kind: Literal["most", "least"]
    value: float

    def met(self, number: float) -> bool:
        return number <= self.value if self.kind == "most" else number >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.kind == 'most' else '>='} {self.value:g}"


# Ours against `python -m llama_cpp.server` (tuned), and ours against itself.
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
    """Median, min and max of each metric that any round has."""
    names = dict.fromkeys(name for one in rounds for name in one)
    return {name: spread([one[name] for one in rounds if name in one]) for name in names}


def ratios(ours: Rounds, theirs: Rounds) -> dict[str, dict[str, float]]:
    """Ours / theirs, formed within each round and only then summed up: what slowed a round slowed both halves."""
    pairs = list(zip(ours, theirs, strict=True))
    names = [name for name in dict.fromkeys(name for one in ours for name in one) if not name.endswith("_x")]
    found = {}
    for name in names:
        values = [a[name] / b[name] for a, b in pairs if name in a and b.get(name)]
        if values:
            found[name] = spread(values)
    return found


def judged(numbers: Mapping[str, Mapping[str, float]], goals: Mapping[str, Goal]) -> dict[str, dict[str, Any]]:
    """Each number that has a goal, with the goal and whether its median meets it."""
    return {
        name: {**numbers[name], "goal": str(goal), "met": goal.met(numbers[name]["median"])}
        for name, goal in goals.items()
        if name in numbers
    }


def line(values: Mapping[str, Any]) -> None:
    """One JSON line on standard output."""
    print(json.dumps(values), flush=True)


def table(title: str, columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Medians with (min-max), a row a metric, a column a server: for people."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[title, *columns]]
    for name in names:
        cells = [column.get(name) for column in columns.values()]
        rows.append([name, *("-" if c is None else f"{c['median']:g} ({c['min']:g}-{c['max']:g})" for c in cells)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
