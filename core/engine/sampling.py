"""Sampler: llama.cpp's own sampler chain for one sequence, and logprobs. Knows tokens and logits only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.engine.interface import Sampling

SEED_SPACE = 1 << 32


def draw_seed() -> int:
    """A seed from the system, never from earlier state: two environments restored from one snapshot must differ."""
    # llama.cpp reads 0xFFFFFFFF as "pick one yourself".
    return int.from_bytes(os.urandom(4), "little") % (SEED_SPACE - 1)


class Sampler:
    """One chain: logit bias, penalties, top-k, top-p, min-p, temperature, draw. Built once a sequence; `free` it."""

    def __init__(
        self, bindings: Any, sampling: Sampling, *, prompt: Iterable[int] = (), n_vocab: int, n_ctx: int, index: int
    ) -> None:
        """`index` of the sequence is added to the seed. `prompt` counts for `repeat_penalty`."""
        self._sample = bindings.llama_sampler_sample
        self._accept = bindings.llama_sampler_accept
        self._free = bindings.llama_sampler_free
        self.penalised = bool(sampling.repeat_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)
        chain = bindings.llama_sampler_chain_init(bindings.llama_sampler_chain_default_params())
        links = []
        if sampling.logit_bias:
            biases = (bindings.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
            links.append(bindings.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
        links += _penalties(bindings, sampling, prompt, n_vocab, n_ctx)
        if sampling.temperature <= 0:
            links.append(bindings.llama_sampler_init_greedy())
        else:
            if sampling.top_k > 0:
                links.append(bindings.llama_sampler_init_top_k(sampling.top_k))
            if sampling.top_p < 1:
                links.append(bindings.llama_sampler_init_top_p(sampling.top_p, 1))
            if sampling.min_p > 0:
                links.append(bindings.llama_sampler_init_min_p(sampling.min_p, 1))
            if sampling.temperature != 1:
                links.append(bindings.llama_sampler_init_temp(sampling.temperature))
            seed = draw_seed() if sampling.seed is None else (sampling.seed + index) % (SEED_SPACE - 1)
            links.append(bindings.llama_sampler_init_dist(seed))
        for link in links:
            bindings.llama_sampler_chain_add(chain, link)
        self._chain = chain

    def sample(self, context: Any, row: int) -> int:
        """Draw a token from the logits of batch index `row` and note it for the penalties."""
        return int(self._sample(self._chain, context, row))

    def accept(self, token: int) -> None:
        """Note a token that was not drawn (a forced one) for the penalties."""
        if self.penalised:
            self._accept(self._chain, token)

    def free(self) -> None:
        if self._chain is not None:
            self._free(self._chain)
            self._chain = None


def _penalties(bindings: Any, sampling: Sampling, prompt: Iterable[int], n_vocab: int, n_ctx: int) -> list[Any]:
    """The links for the penalties that are set. Their window is the context, so that they look at the whole answer."""
    links = []
    if sampling.repeat_penalty != 1.0:
        repeat = bindings.llama_sampler_init_penalties(n_vocab, n_ctx, sampling.repeat_penalty, 0.0, 0.0)
        # As in transformers and llama-server the prompt counts, too. How often a token occurs makes no difference.
        for token in set(prompt):
            bindings.llama_sampler_accept(repeat, token)
        links.append(repeat)
    if sampling.presence_penalty or sampling.frequency_penalty:
        # OpenAI's two penalties look at the answer alone.
        links.append(
            bindings.llama_sampler_init_penalties(
                n_vocab, n_ctx, 1.0, sampling.frequency_penalty, sampling.presence_penalty
            )
        )
    return links


def logits_of(bindings: Any, context: Any, row: int, n_vocab: int) -> Any:
    """The logits of batch index `row` as a writable numpy view on llama.cpp's buffer, valid until the next decode."""
    import numpy as np  # only masks and logprobs need it: 0.1-0.3 s at a cold start

    pointer = bindings.llama_get_logits_ith(context, row)
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * n_vocab)).contents)


def log_softmax(logits: Any) -> Any:
    """Natural logarithms of the probabilities, float32 of shape (n_vocab,)."""
    import numpy as np

    highest = logits.max()
    return logits - (highest + np.log(np.exp(logits - highest).sum()))


def likeliest(logprobs: Any, count: int) -> list[int]:
    """Indices of the `count` largest entries, largest first."""
    import numpy as np

    count = min(count, len(logprobs))
    if count == 0:
        return []
    top = np.argpartition(logprobs, -count)[-count:]
    return [int(token) for token in top[np.argsort(-logprobs[top], kind="stable")]]
