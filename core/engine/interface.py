"""Define what goes into an engine and what comes out: plain values, tokens and text. No HTTP, no OpenAI shapes.

A *request* asks for `n` *sequences* over one prompt. A *slot* holds one sequence in llama.cpp's KV cache. *Prefill*
computes the prompt's tokens, *decode* makes new ones. A *delta* is what a sequence gained in one step.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from msgspec import Struct

from core.errors import ApiError
from core.metrics import Histogram

# "tool_calls": the sequence ended by itself and made at least one whole call. "length": it was cut, even inside a call.
FinishReason = Literal["stop", "length", "tool_calls"]

# Why a sequence ended with "length": its own `max_tokens`, the context size, its deadline, or no KV cells left.
Cause = Literal["max_tokens", "context", "deadline", "memory"]


class Sampling(Struct, frozen=True):
    """How llama.cpp's sampler chain draws the next token. Defaults are OpenAI's (temperature 1)."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repeat_penalty: float = 1.0  # counts tokens in prompt and answer; the next two count the answer only
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random seed
    logit_bias: Mapping[int, float] = {}


class Text(Struct, frozen=True):
    """The next part of the answer's content: whole characters."""

    text: str


class Reasoning(Struct, frozen=True):
    """The next part of what the model thinks before it answers."""

    text: str


class Call(Struct, frozen=True):
    """A tool call begins. Its arguments and a CallEnd follow. `id` is the model's own, if it writes one."""

    name: str
    id: str | None = None


class Arguments(Struct, frozen=True):
    """The next part of the call's arguments: a piece of the JSON text of an object."""

    text: str


class CallEnd(Struct, frozen=True):
    """The call is complete. A call without this event was cut."""


Event = Text | Reasoning | Call | Arguments | CallEnd


class Piece(NamedTuple):
    """What a parser reads: text, or a marker, which is one token of the vocabulary and never text that spells it."""

    text: str
    marker: bool = False


class Parser(Protocol):
    """Reads the pieces of one sequence and returns its events. Holds back only what may begin a marker.

    Pieces may be cut anywhere: the events add up to the same text, reasoning and calls.
    """

    @property
    def reasoning(self) -> bool:
        """Whether the next piece is reasoning."""
        ...

    @property
    def calling(self) -> bool:
        """Whether a call has been opened and not ended. From there on the call's grammar holds."""
        ...

    @property
    def overrun(self) -> str:
        """The text that the piece which opened the call had after the opener. It belongs to the call."""
        ...

    def feed(self, piece: Piece) -> list[Event]: ...

    def reject(self) -> list[Event]:
        """Return the text since the call was opened: it is no call after all."""
        ...

    def finish(self, *, cut: bool) -> list[Event]:
        """Return what was held back. `cut` means that a limit ended the sequence, not the model."""
        ...


class OutputFormat(Struct, frozen=True):
    """How a sequence's tokens become events. Without one, all of them are text.

    `parser` makes the parser of one sequence. `markers` are the texts of the tokens that it reads as markers.
    `call_grammar` holds from the end of a call's opener to the end of the call (tool_choice "auto"). With
    `end_after_call`, the first call ends the sequence. `reasoning_budget` is the most tokens of reasoning; `closer` is
    forced then.
    """

    parser: Callable[[], Parser]
    markers: frozenset[str] = frozenset()
    call_grammar: str | None = None
    end_after_call: bool = False
    reasoning_budget: int | None = None
    closer: tuple[int, ...] = ()


class GenerationRequest(Struct, frozen=True):
    """A prompt and how to continue it.

    `max_tokens` None means until the context is full. `grammar` is an llguidance grammar (see `core.engine.grammar`).
    It holds from the first token, or from the end of the reasoning if the prompt ends in reasoning. Stop strings are
    looked for in text, not in reasoning or calls. `top_logprobs` None means no logprobs, 0 those of the chosen tokens
    only. A prompt prefix is never shared between tenants. `deadline` is on `time.monotonic()`'s clock. At the deadline
    a sequence ends with finish_reason "length"; if there is no token yet, the request fails with DeadlineExceeded or
    ModelUnavailable.
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
    output: OutputFormat | None = None
    score_prompt: bool = False  # compute the logprobs of the prompt's tokens, too; needs `top_logprobs`


class TokenLogprob(Struct, frozen=True):
    """The natural logarithm of a token's probability, before any sampling setting. `top` holds the likeliest tokens."""

    token: bytes  # the name of a control token, else its bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()
    control: bool = False  # it adds nothing to the text


class Delta(Struct, frozen=True):
    """What one sequence gained in a step: events (perhaps none yet) and the number of tokens behind them.

    `tokens` counts sampled and forced tokens, without the end-of-turn token. Over a sequence they add up to
    `completion_tokens`; `reasoning_tokens` of them are reasoning. The last delta of a sequence has a `finish_reason`,
    for "length" its `cause`, and `stop` if a stop string of the request ended it. The first delta of a request with
    `score_prompt` has the logprobs of all prompt tokens but the first, which nothing predicts.
    """

    index: int  # which of the n sequences
    events: tuple[Event, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cause: Cause | None = None
    stop: str | None = None
    reasoning_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The content that it adds."""
        return "".join([event.text for event in self.events if isinstance(event, Text)])


class Timings(Struct, frozen=True):
    """Where the time of a request went, in milliseconds."""

    queue_ms: float = 0.0  # from `generate` until a slot was free
    prefill_ms: float = 0.0  # until the first token
    decode_ms: float = 0.0  # until the latest token


class Generation(Protocol):
    """A running request. Iterate over its deltas until each of the n sequences has had its `finish_reason`."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that needed no prefill. Final once the first delta is out."""
        ...

    @property
    def token_intervals(self) -> Histogram:
        """Seconds between two steps of one sequence."""
        ...

    @property
    def timings(self) -> Timings:
        """Timings so far. Queue and prefill are final once the first delta is out, decode after the last one."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __anext__(self) -> Delta: ...

    def cancel(self) -> None:
        """Stop at the next step and free the slots. Idempotent; any thread may call it, also after the end."""


class InfillTokens(NamedTuple):
    """The control tokens of fill-in-the-middle prompts. The last two, for other files, may be missing."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    separator: int | None


class ModelCard(Struct, frozen=True):
    """Describes a loaded model."""

    name: str  # as in requests
    path: str
    size_bytes: int
    description: str  # llama.cpp's own, e.g. "llama 135M Q4_1"
    architecture: str
    n_params: int
    n_vocab: int
    n_ctx: int  # the shared KV size, and the most tokens of one request
    n_ctx_train: int
    chat_template: str | None  # Jinja source from the GGUF; None: use ChatML
    bos: str  # texts of the special tokens, "" where the model has none
    eos: str
    metadata: Mapping[str, str] = {}
    infill: InfillTokens | None = None  # None: the vocabulary has none

    @property
    def remedy(self) -> str:
        """A sentence that says what to do about a prompt that does not fit."""
        if 0 < self.n_ctx_train <= self.n_ctx:
            return "The model was trained on this many tokens, so N_CTX cannot raise it: shorten the prompt."
        return "Shorten the prompt or raise N_CTX."


class EngineConfig(Struct, frozen=True):
    """How to load a model. `n_threads` 0 means as many as the process has CPUs."""

    n_ctx: int = 4096
    n_batch: int = 256
    n_threads: int = 0
    n_gpu_layers: int = 0
    n_parallel: int = 4
    max_queue: int = 64
    repack: bool = True
    verbose: bool = False


class LoadedEngine(Protocol):
    """What a host needs of any loaded model. Thread-safe: any thread may call any method."""

    card: ModelCard
    config: EngineConfig

    @property
    def failed(self) -> ApiError | None:
        """The error that ended the engine thread, None while it serves or after `stop`."""
        ...

    def warm(self) -> None:
        """Prepare for the first request, which also pages in the weights. Does not wait until that is done."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return the counters since the load."""
        ...

    def stop(self) -> None:
        """End everything that runs and accept no more. Memory is freed by `close`. Idempotent."""
        ...

    def close(self) -> None:
        """Stop and free the memory. Blocks until the engine thread has ended."""
        ...


class Engine(LoadedEngine, Protocol):
    """A model that generates text."""

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        """Return the token ids of `text`, without BOS.

        With `special`, names such as "<|im_start|>" become their control tokens. With `continued`, the text follows
        another one, so the vocabulary puts no space in front.
        """
        ...

    def token_pieces(self, tokens: Collection[int], *, special: bool) -> list[bytes]:
        """Return the bytes of each token; joined they are the text. A piece may end inside a character.

        A control token shows as its name with `special`, and is empty without. Ids must be below `card.n_vocab`.
        """
        ...

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer (end of sequence, of turn, of message)."""
        ...

    def control_names(self, text: str) -> list[int]:
        """Return where names of control tokens begin in `text`, in rising order. The first call for a model blocks."""
        ...

    def check_grammar(self, grammar: str) -> None:
        """Raise InvalidRequest if the grammar cannot be compiled (too complex, unsatisfiable)."""
        ...

    def generate(self, request: GenerationRequest) -> Generation:
        """Queue a request. Call it on the event loop that will iterate the generation.

        Raises ContextOverflow if prompt and one token do not fit, Busy if the queue is full.
        """
        ...

    def warm(self) -> None:
        """Prefill the template's shared prefix while no request runs, which also pages in the weights.

        Blocks while the template is compiled, but not during the prefill.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """Return the counters since the load, and the current `sequences` (running, total), `queued` and `kv_cells`.

        `kv_cells` has `used`, the cells of running sequences, and `total`, None for a model whose states do not grow.
        The counters are requests, prompt_tokens, cached_tokens, completion_tokens, decode_calls, preempted, aborted.
        """
        ...


Pooling = Literal["none", "mean", "cls", "last", "rank"]
Vector: TypeAlias = "array[float]"  # of 32-bit floats; array.array has no [] before Python 3.12


class Embedder(LoadedEngine, Protocol):
    """A model that turns texts into vectors, or with pooling "rank" a query and a document into scores."""

    pooling: Pooling
    n_dimensions: int  # of a vector
    probabilities: bool  # with pooling "rank": whether a score is a probability and not a logit

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with the special tokens that the model expects around it."""
        ...

    def encode_pair(self, query: str, document: str) -> list[int]:
        """Return the tokens of a query and a document, as a reranker reads them."""
        ...

    def embed(self, texts: Sequence[Sequence[int]]) -> Future[list[Vector]]:
        """Queue texts of 1 to `card.n_ctx` tokens. Return their vectors as the model computes them, not normalised.

        Cancelling the future drops the texts. Raises Busy if the queue is full. The future may raise ModelUnavailable.
        """
        ...
