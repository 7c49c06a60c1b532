"""Draw the phases of a cold start as bars in an SVG, for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 860, 190, 90
ROW, BAR, TOP, BETWEEN = 22, 14, 34, 52

_STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px } .faint { fill: #59636e } .grid { stroke: #d1d9e0 }
.bar { fill: #0969da } .ideal { fill: #0969da; opacity: .12 } .first { stroke: #cf222e; stroke-width: 1.5 }
.red { fill: #cf222e }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .faint { fill: #9198a1 } .grid { stroke: #3d444d } .bar { fill: #4493f8 }
  .ideal { fill: #4493f8; opacity: .2 } .first { stroke: #f85149 } .red { fill: #f85149 }
}
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One cold start. Times are in seconds since the process began; `ideal` is the transfer time alone."""

    title: str
    phases: Mapping[str, tuple[float, float]]  # name -> (begin, end)
    first_token: float
    ideal: float


def draw(starts: Sequence[Start], note: str) -> str:
    """Return an SVG with all starts, one below the other, on one time scale."""
    longest = max(max(end for _, end in start.phases.values()) for start in starts)
    longest = max(longest, *(max(start.first_token, start.ideal) for start in starts)) * 1.02
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts: list[str] = []
    y = 8
    for start in starts:
        parts += _start(start, y, scale, longest)
        y += TOP + ROW * len(start.phases) + BETWEEN
    height = y + 4
    parts.append(f'<text class="faint" x="8" y="{y - 10}">{escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>Cold start, phase by phase</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _start(start: Start, y: float, scale: float, longest: float) -> list[str]:
    top, bottom = y + TOP - 6, y + TOP + ROW * len(start.phases)
    ideal, first = LEFT + start.ideal * scale, LEFT + start.first_token * scale
    parts = [
        f'<text class="title" x="8" y="{y + 14}">{escape(start.title)}</text>',
        f'<rect class="ideal" x="{LEFT}" y="{top}" width="{start.ideal * scale:.1f}" height="{bottom - top}"/>',
    ]
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60) if longest / step <= 12)
    for index in range(int(longest / step) + 1):
        x = LEFT + index * step * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="faint" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{index * step:g} s</text>'
        )
    for row, (name, (begin, end)) in enumerate(start.phases.items()):
        at = y + TOP + row * ROW
        width = max(1.5, (end - begin) * scale)
        parts.append(f'<text x="{LEFT - 8}" y="{at + 11}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{LEFT + begin * scale:.1f}" y="{at}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        )
        parts.append(
            f'<text class="faint" x="{LEFT + begin * scale + width + 5:.1f}" y="{at + 11}">'
            f"{(end - begin) * 1000:.0f} ms</text>"
        )
    parts.append(f'<line class="first" x1="{first:.1f}" x2="{first:.1f}" y1="{top - 4}" y2="{bottom}"/>')
    parts.append(f'<text class="red" x="{first:.1f}" y="{top - 8}" text-anchor="middle">first token</text>')
    parts.append(
        f'<text class="faint" x="{ideal:.1f}" y="{bottom + 30}" text-anchor="end">bytes ÷ bandwidth {start.ideal:.2f} s'
        f" · first token {start.first_token:.2f} s · ratio {start.first_token / start.ideal:.2f}</text>"
    )
    return parts
