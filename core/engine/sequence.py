"""Sequence: one of the n answers to a request, from its prompt to its end. Slot: where it lies in the KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from core.engine.detokenizer import TextStream

if TYPE_CHECKING:
    from core.engine.interface import GenerationRequest
    from core.engine.sampling import Sampler
    from core.engine.stream import PieceStream


class Span(NamedTuple):
    """Cells of one origin: tokens that were decoded by one slot, one after the other. They end before `end`."""

    origin: object
    end: int


class Slot:
    """A sequence id of llama.cpp's cache. `tokens` are those whose keys and values it holds, from position 0."""

    __slots__ = ("copied", "id", "n_prompt", "origin", "sequence", "tenant", "tokens", "used")

    def __init__(self, slot_id: int) -> None:
        self.id = slot_id
        self.tokens: list[int] = []
        self.copied: list[Span] = []  # cells that came from other slots, the first tokens
        self.origin = object()  # of the cells behind those
        self.n_prompt = 0  # how many of them were the last request's prompt
        self.tenant = ""
        self.used = 0  # when it was last taken, by the scheduler's count
        self.sequence: Sequence | None = None

    def spans(self, length: int | None = None) -> list[Span]:
        """Where the first `length` tokens lie (None: all). Slots that share cells have equal spans at the start."""
        length = len(self.tokens) if length is None else length
        spans, start = [], 0
        for origin, end in (*self.copied, Span(self.origin, len(self.tokens))):
            if start < length and start < end:
                spans.append(Span(origin, min(end, length)))
            start = end
        return spans


def count_cells(places: Iterable[list[Span]]) -> int:
    """How many cells these tokens take, each shared one counted once."""
    lengths: dict[object, int] = {}
    for spans in places:
        start = 0
        for origin, end in spans:  # whoever shares an origin shares it from its first cell on
            lengths[origin] = max(lengths.get(origin, 0), end - start)
            start = end
    return sum(lengths.values())


class Sequence:
    """`tokens` holds prompt and answer; those from `slot.tokens` on are still to be decoded."""

    __slots__ = (
        "admitted",
        "begun",
        "index",
        "leader",
        "matcher",
        "n_prompt",
        "prefill",
        "request",
        "sampler",
        "slot",
        "stream",
        "text",
        "tokens",
    )

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        stream: PieceStream,
        sampler: Sampler,
        matcher: Any,
        leader: Sequence | None,
    ) -> None:
        self.request = request
        self.index = index
        self.stream = stream
        self.sampler = sampler
        self.matcher = matcher
        self.leader = leader  # the sequence that reads the shared prompt; None for that one itself
        self.tokens = list(request.prompt)
        self.n_prompt = len(self.tokens)
        self.text = TextStream(request.stop)
        self.slot: Slot | None = None
        self.admitted = 0
        self.prefill = self.n_prompt  # its first tokens, which are read before it decodes; after a pause all it had
        self.begun = False  # has been admitted once: a paused sequence is not a new one

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def decoded(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.slot.tokens) if self.slot else 0

    @property
    def pending(self) -> int:
        """Tokens not decoded yet. One: decoding; more: prefill, or forced tokens."""
        return len(self.tokens) - self.decoded

    @property
    def reading(self) -> bool:
        return self.decoded < self.prefill

    def growth(self, n_limit: int) -> int:
        """The most tokens it may still gain; no sequence has more than `n_limit`."""
        room = n_limit - len(self.tokens)
        return room if self.request.max_tokens is None else min(room, self.request.max_tokens - self.produced)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens `a` and `b` share from the start. Compares slices, so mostly in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
