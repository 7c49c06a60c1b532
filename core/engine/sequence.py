"""Sequence: one of the n answers to a request, from its prompt to its end. Slot: where it lies in the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.engine.text import TextStream

if TYPE_CHECKING:
    from core.engine.generation import GenerationRequest
    from core.engine.sampling import Sampler
    from core.engine.stream import PieceStream


class Slot:
    """A sequence id of llama.cpp's cache. `tokens` are those whose keys and values it holds, from position 0."""

    __slots__ = ("id", "n_prompt", "sequence", "tenant", "tokens", "used")

    def __init__(self, slot_id: int) -> None:
        self.id = slot_id
        self.tokens: list[int] = []
        self.n_prompt = 0  # how many of them were the last request's prompt
        self.tenant = ""
        self.used = 0  # when it was last taken, by the scheduler's count
        self.sequence: Sequence | None = None


class Sequence:
    """`tokens` holds prompt and answer; those from `slot.tokens` on are still to be decoded."""

    __slots__ = (
        "admitted",
        "begun",
        "index",
        "leader",
        "matcher",
        "n_prompt",
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
        self.begun = False  # has been admitted once: a paused sequence is not a new one

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def pending(self) -> int:
        """Tokens not decoded yet. One: decoding; more: prefill, or forced tokens."""
        return len(self.tokens) - (len(self.slot.tokens) if self.slot else 0)

    @property
    def prompt_read(self) -> bool:
        return self.produced > 0 or (self.slot is not None and self.pending == 0)


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
