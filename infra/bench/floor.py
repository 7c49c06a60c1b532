"""Measure the raw llama.cpp loop: decode calls without HTTP, scheduler and text.

    python -m infra.bench floor --model FILE

The result, one JSON line, is the limit of this machine with this build; the difference to a server is the server's
cost. Sampling is greedy with llama.cpp's sampler, as in the servers at temperature 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from core.engine.native import bindings
from core.timeline import process_started
from infra.bench.contender import Load
from infra.bench.model import add_arguments, load_from
from infra.bench.workload import CLIENT_TOKENS, CLIENTS, DECODE_TOKENS, PROMPT_TOKENS

SHORT_PROMPT = 56  # tokens; similar to the prompts of the decode measurements


class Loop:
    """A model, a context and a greedy sampler."""

    def __init__(self, load: Load, *, repack: bool = True) -> None:
        self.lib: Any = bindings()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repack
        self.model = self.lib.llama_model_load_from_file(os.fsencode(load.model), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {load.model}")
        context = self.lib.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.kv_unified = load.n_ctx, load.n_parallel, True
        context.n_batch = context.n_ubatch = load.n_batch
        context.n_threads = context.n_threads_batch = load.n_threads
        self.context: Any = self.lib.llama_init_from_model(self.model, context)
        self.memory = self.lib.llama_get_memory(self.context) if self.context else None
        self.sampler = self.lib.llama_sampler_chain_init(self.lib.llama_sampler_chain_default_params())
        self.lib.llama_sampler_chain_add(self.sampler, self.lib.llama_sampler_init_greedy())
        self.n_batch = load.n_batch
        self.batch = self.lib.llama_batch_init(load.n_batch, 0, 1)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run one decode call. Each row is (token, position, sequence, whether to compute logits)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for k, (token, position, sequence, logits) in enumerate(rows):
            batch.token[k], batch.pos[k], batch.logits[k] = token, position, logits
            batch.n_seq_id[k], batch.seq_id[k][0] = 1, sequence
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def sample(self, row: int) -> int:
        return int(self.lib.llama_sampler_sample(self.sampler, self.context, row))

    def prefill(self, tokens: Sequence[int], sequence: int = 0) -> int:
        """Prefill `tokens` in slices of n_batch. Return the first new token."""
        row = 0
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            row = len(part) - 1
            last = start + len(part) == len(tokens)
            self.decode([(token, start + k, sequence, last and k == row) for k, token in enumerate(part)])
        return self.sample(row)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, False)

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_sampler_free(self.sampler)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def prompt(length: int) -> list[int]:
    """Return arbitrary tokens. Prompts may repeat, because there is no prefix cache."""
    return [300 + k * 7 % 1000 for k in range(length)]


def decode_rate(loop: Loop, sequences: int, tokens: int) -> float:
    """Return decode tokens/s of all sequences together, without prefill."""
    loop.clear()
    latest = [loop.prefill(prompt(SHORT_PROMPT), sequence) for sequence in range(sequences)]
    begun = time.monotonic()
    for step in range(tokens - 1):
        loop.decode([(token, SHORT_PROMPT + step, sequence, True) for sequence, token in enumerate(latest)])
        latest = [loop.sample(row) for row in range(sequences)]
    return sequences * (tokens - 1) / (time.monotonic() - begun)


def measure(load: Load) -> dict[str, float]:
    """Measure start, decode for one and several sequences, and prefill of a 1,000-token prompt."""
    started = process_started()
    loop = Loop(load)
    try:
        loop.prefill(prompt(SHORT_PROMPT // 2))
        start = time.monotonic() - started
        single = decode_rate(loop, 1, DECODE_TOKENS)
        many = decode_rate(loop, min(CLIENTS, load.n_parallel), CLIENT_TOKENS)
        loop.clear()
        begun = time.monotonic()
        loop.prefill(prompt(PROMPT_TOKENS))
        cold = time.monotonic() - begun
    finally:
        loop.close()
    return {"start_s": start, "decode_1_tok_s": single, f"decode_{CLIENTS}_tok_s": many, "ttft_cold_s": cold}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench floor", description=__doc__.partition("\n\n")[0])
    add_arguments(parser)
    print(json.dumps(measure(load_from(parser.parse_args(argv)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
