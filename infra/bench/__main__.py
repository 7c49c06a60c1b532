"""Run a benchmark: `python -m infra.bench [NAME] [options]`. Without a name it runs `server`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

DEFAULT = "server"
PARTS = frozenset({"bucket", "client", "contender", "model", "peer", "process", "report", "timeline_svg", "workload"})


def names() -> list[str]:
    """Return the modules of this folder that are benchmarks. Each has `main(argv) -> int`."""
    modules = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    return sorted(modules - PARTS)


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\n\nBenchmarks: {', '.join(names())}. Each has --help.")
        return 0
    if argv and not argv[0].startswith("-"):
        if argv[0] not in names():
            print(f"There is no benchmark {argv[0]!r}. Choose one of {', '.join(names())}.", file=sys.stderr)
            return 2
        name, argv = argv[0], argv[1:]
    else:
        name = DEFAULT
    return int(importlib.import_module(f"infra.bench.{name}").main(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
