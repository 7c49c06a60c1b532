"""What goes into the engine and what comes out: plain values, tokens and text. Knows no HTTP and no OpenAI shapes.

Glossary, used everywhere: a *request* asks for `n` *sequences* over one prompt; a *slot* is a place in llama.cpp's KV
cache that holds one sequence; a *piece* is what a sequence gained in one step; *prefill* reads prompt tokens, *decode*
makes new ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from core.errors import ApiError

FinishReason = Literal["stop", "length"]

# Why a sequence ended with "length": its own `max_tokens`, the context size, its deadline, or no KV cells left.
Cause = Literal["max_tokens", "context", "deadline", "memory"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; llama.cpp's own sampler chain does it. Defaults are OpenAI's (temperature 1)."""

    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repeat_penalty: float = 1.0  # of tokens in prompt and answer; the next two look at the answer only
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: drawn from the system
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def repeatable(self) -> bool:
        """Whether the same request should give the same text.

        It does on a server that does nothing else, with the prompt's prefix wholly cached or not at all. Beside other
        sequences it is best effort, as with OpenAI's `seed`: another batch shape adds up floats in another order, and
        a prompt that is half cached, or read in slices next to a running answer, has another shape.
        """
        return self.seed is not None or self.temperature <= 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to go on from it.

    `max_tokens` None means until the context is full. `grammar` is an llguidance grammar
    (see `core.engine.grammar`).
    `top_logprobs` None means no logprobs, 0 the chosen token's only. `tenant` separates prefix caches: a prefix is
    never shared between tenants. `deadline` is on `time.monotonic()`'s clock: then the sequence ends with finish
    "length", or with ModelUnavailable if no token has come yet.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    top_logprobs: int | None = None
    tenant: str = ""
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before any sampling setting; `top` holds the likeliest tokens."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence gained in a step: whole characters (perhaps none yet) and the number of tokens behind them.

    `tokens` counts sampled and forced tokens, without the end-of-turn token. Over a sequence they add up to
    `completion_tokens`. The last delta of a sequence has a `finish_reason`, and for "length" its `cause`.
    """

    index: int  # which of the n sequences
    text: str
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in milliseconds."""

    queue_ms: float = 0.0  # from `generate` until a slot was free
    prefill_ms: float = 0.0  # until the first token
    decode_ms: float = 0.0  # until the latest token


class Generation(Protocol):
    """A running request. Iterate over its deltas until each of the n sequences has had its `finish_reason`."""

    cached_tokens: int  # prompt tokens that needed no prefill; final once the first delta is out

    @property
    def timings(self) -> Timings:
        """Timings so far. Queue and prefill are final once the first delta is out, decode after the last one."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __anext__(self) -> Delta: ...

    def cancel(self) -> None:
        """Stop at the next step and free the slots. Idempotent, callable from any thread, also after the end."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a loaded model."""

    name: str  # what clients call it
    path: str
    size_bytes: int
    description: str  # llama.cpp's, e.g. "llama 135M Q4_1"
    architecture: str
    n_params: int
    n_vocab: int
    n_ctx: int  # the shared KV size, and the most one request may use
    n_ctx_train: int
    chat_template: str | None  # Jinja source from the GGUF; None: ChatML is used
    bos: str  # texts of the special tokens, "" where the model has none
    eos: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def remedy(self) -> str:
        """What to do about a prompt that does not fit."""
        if 0 < self.n_ctx_train <= self.n_ctx:
            return "The model was trained on no more, so N_CTX cannot raise it: shorten the prompt."
        return "Shorten the prompt or raise N_CTX."


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded. `n_threads` 0: as many as there are CPUs for this process."""

    n_ctx: int = 4096
    n_batch: int = 256
    n_threads: int = 0
    n_gpu_layers: int = 0
    n_parallel: int = 4
    max_queue: int = 64
    repack: bool = True
    verbose: bool = False


class Engine(Protocol):
    """One loaded model. Thread-safe: any thread may call any method."""

    card: ModelCard
    config: EngineConfig

    @property
    def failed(self) -> ApiError | None:
        """Why this engine serves no more though it was not stopped; None while it serves."""
        ...

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added; `special` lets "<|im_start|>" and the like become their tokens.
        `continued`: it goes on from another text, so the vocabulary puts no space in front."""
        ...

    def control_names(self, text: str) -> list[int]:
        """Where names of control tokens begin in `text`, in rising order. Blocks at the first call for a model."""
        ...

    def check_grammar(self, grammar: str) -> None:
        """Raise InvalidRequest if the grammar cannot be compiled (too complex, unsatisfiable)."""
        ...

    def generate(self, request: GenerationRequest) -> Generation:
        """Queue a request; call on the event loop that will iterate it.

        Raises ContextOverflow if prompt and one token do not fit, Busy if the queue is full.
        """
        ...

    def warm(self) -> None:
        """Nobody waits yet: read what the template begins with into the cache, and so the weights into memory. Blocks
        while the template is compiled, not while it is read."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters since the load: decode_calls, prompt_tokens, cached_tokens, completion_tokens, requests, and now:
        sequences {running, total}, queued."""
        ...

    def stop(self) -> None:
        """Cancel what runs and take no more; the memory stays until `close`. Idempotent."""
        ...

    def close(self) -> None:
        """Cancel what runs, free the memory. Blocks until the engine thread has ended."""
        ...
