"""`python -m infra.settings_table`: write `.env.example` and the README's table from `core.settings`; `--check` only
compares and exits 1 if they differ."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from core.settings import Settings

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- settings: made by `python -m infra.settings_table` -->", "<!-- end of settings -->"

ENV_HEAD = """\
# Every setting, with its default. Copy to .env and uncomment what you change; the process's environment wins over it.
# Made by `python -m infra.settings_table` from core/settings.py.
"""


def groups() -> list[tuple[str, list[dict[str, str]]]]:
    """The settings under the headings of their class's source, each as name, default, doc."""
    fields = {field.name: field.metadata for field in dataclasses.fields(Settings)}
    found: list[tuple[str, list[dict[str, str]]]] = []
    for line in inspect.getsource(Settings).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            found.append((heading[1].partition(":")[0], []))
        elif (declared := re.match(r"    (\w+): .*= setting\(", line)) and declared[1] in fields:
            found[-1][1].append(dict(fields[declared[1]]))
    assert sum(len(settings) for _, settings in found) == len(fields)
    return found


def table() -> str:
    lines = ["| Variable | Default | What it does |", "| --- | --- | --- |"]
    for heading, settings in groups():
        lines.append(f"| **{heading}** | | |")
        for one in settings:
            default = f"`{one['default']}`" if one["default"] else ""
            lines.append(f"| `{one['name']}` | {default} | {one['doc'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def env_example() -> str:
    lines = [ENV_HEAD]
    for heading, settings in groups():
        lines.append(f"# --- {heading} ---")
        lines.extend(f"# {one['doc'].replace('`', '')}\n#{one['name']}={one['default']}\n" for one in settings)
    return "\n".join(lines)


def readme(text: str) -> str:
    """`text` with the table between its two marks made anew."""
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"README.md lacks the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    wanted = {
        ROOT / ".env.example": env_example(),
        ROOT / "README.md": readme((ROOT / "README.md").read_text()),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is not what core/settings.py says; run: python -m infra.settings_table")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
