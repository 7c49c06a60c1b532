"""Assign slots of llama.cpp's KV cache to sequences, and reuse the prompt prefixes that the slots still hold.

The cache is unified: all slots share its cells. Copying a prefix from one slot to another takes no cells and no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context, Memory
    from core.engine.generation import Sequence


class Span(NamedTuple):
    """Consecutive cells that one slot decoded, up to token position `end`. Copies of them have the same `origin`."""

    origin: object
    end: int


class Slot:
    """A sequence id of llama.cpp's. `tokens` are those whose keys and values it holds, from position 0."""

    __slots__ = ("copied", "id", "n_prompt", "origin", "sequence", "tenant", "tokens", "used")

    def __init__(self, slot_id: int) -> None:
        self.id = slot_id
        self.tokens: list[int] = []
        self.copied: list[Span] = []  # of its first tokens, those that were copied from other slots
        self.origin = object()  # of the cells after those
        self.n_prompt = 0  # length of the latest request's prompt
        self.tenant = ""
        self.used = 0  # number of its latest assignment; the lowest is the least recently used
        self.sequence: Sequence | None = None

    def spans(self, length: int | None = None) -> list[Span]:
        """Return the cells of the first `length` tokens (None: all). Slots that share cells begin with equal spans."""
        length = len(self.tokens) if length is None else length
        spans, start = [], 0
        for origin, end in (*self.copied, Span(self.origin, len(self.tokens))):
            if start < length and start < end:
                spans.append(Span(origin, min(end, length)))
            start = end
        return spans


def count_cells(places: Iterable[list[Span]]) -> int:
    """Return how many cells all these spans take. A shared cell counts once."""
    lengths: dict[object, int] = {}
    for spans in places:
        start = 0
        for origin, end in spans:  # spans of one origin share it from its first cell on
            lengths[origin] = max(lengths.get(origin, 0), end - start)
            start = end
    return sum(lengths.values())


class Cache:
    """Belongs to the engine thread.

    `trimmable` is False for recurrent and hybrid models, whose state cannot be cut back to a shorter prefix. `window`
    is the number of tokens that a sliding-window layer sees, 0 without one.
    """

    def __init__(self, bindings: Bindings, context: Context, n_slots: int, *, trimmable: bool, window: int = 0) -> None:
        self._bindings = bindings
        # Not None: that is checked when the context is made.
        self._memory = cast("Memory", bindings.llama_get_memory(context))
        self._trimmable = trimmable
        self._window = window
        self._assignments = 0
        self.slots = [Slot(slot_id) for slot_id in range(n_slots)]
        self.template_slot = Slot(n_slots)  # holds the template's shared prefix for all tenants; no sequence runs in it

    def free_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.sequence is None]

    def used(self) -> int:
        """Return the cells of running sequences. Idle prefixes do not count, because they can be evicted."""
        return count_cells(slot.spans() for slot in self.slots if slot.sequence is not None)

    def needed(self, sequence: Sequence) -> int:
        """Return the cells that `sequence` needs beyond `used` if it is admitted now."""
        source, shared = self._find(sequence)
        places = [slot.spans() for slot in self.slots if slot.sequence is not None]
        before = count_cells(places)
        if source is not None:
            places.append(source.spans(shared))
        return count_cells(places) - before + len(sequence.tokens) - shared

    def take(self, sequence: Sequence) -> int:
        """Give `sequence` a free slot with the longest prefix that the cache holds for it. Return its length.

        At least one token is left to decode, because sampling needs its logits.
        """
        # 1) The slot with the longest prefix.
        free = self.free_slots()
        source, shared = self._find(sequence)
        # 2) Reuse that slot itself, or copy the prefix if the slot is busy or holds more that is worth keeping.
        if source in free and self._may_truncate(source, shared):
            target = source
        else:
            target = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.used))
            if target is not source:
                self.clear(target)
                if source is not None and shared:
                    self._bindings.llama_memory_seq_cp(self._memory, source.id, target.id, 0, shared)
                    target.tokens = source.tokens[:shared]
                    target.copied = source.spans(shared)
        if len(target.tokens) > shared:
            self.trim(target, shared)
        # 3) Assign it.
        self._assignments += 1
        target.used = self._assignments
        target.n_prompt = sequence.n_prompt
        target.tenant = sequence.request.tenant
        target.sequence = sequence
        sequence.slot = target
        return len(target.tokens)

    def _find(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """Return the slot with the longest prefix of `sequence` that its tenant may use, and the prefix's length."""
        tenant, tokens = sequence.request.tenant, sequence.tokens
        source, shared = None, 0
        if sequence.scoring:  # it needs logits of the prompt, and the cache holds keys and values only
            return source, shared
        for slot in (*self.slots, self.template_slot):
            if slot.tokens and (slot.tenant == tenant or slot is self.template_slot):
                length = min(common_prefix(slot.tokens, tokens), len(tokens) - 1)
                if not self._trimmable and (length != len(slot.tokens) or slot.sequence is not None):
                    continue
                if length > shared and self._holds_window(slot, length):
                    source, shared = slot, length
        return source, shared

    def _holds_window(self, slot: Slot, length: int) -> bool:
        """Return whether the cells of a sliding window that ends at `length` tokens are still there.

        llama.cpp reuses cells of a sequence that its window has passed, the oldest first, even with `swa_full`. The
        sequence itself loses nothing, but truncated to `length` it would have a hole in its window.
        """
        if not self._window:
            return True
        oldest = self._bindings.llama_memory_seq_pos_min(self._memory, slot.id)
        return oldest <= max(0, length - self._window + 1)

    @staticmethod
    def _may_truncate(slot: Slot, shared: int) -> bool:
        """Return whether `slot` may be truncated to `shared` tokens: half of it is reused, or its whole prompt is.

        A repeated prompt should stay in its cells. There it adds up floats in the same order, so that the same seed
        gives the same text. In other cells a logprob moved by up to 0.02.
        """
        return shared * 2 >= len(slot.tokens) or shared >= slot.n_prompt - 1

    def release(self, sequence: Sequence) -> None:
        """Free the slot of `sequence`. Its tokens stay for the next request with that prefix."""
        if sequence.slot is not None:
            sequence.slot.sequence = None
            sequence.slot = None

    def trim(self, slot: Slot, length: int) -> None:
        """Truncate `slot` to `length` tokens. This also removes what an aborted decode left beyond `slot.tokens`."""
        if self._bindings.llama_memory_seq_rm(self._memory, slot.id, length, -1):
            if length < len(slot.tokens):
                # The next tokens get other cells than those that another slot may have copied from here.
                slot.copied, slot.origin = slot.spans(length), object()
                del slot.tokens[length:]
        else:
            self.clear(slot)

    def clear(self, slot: Slot) -> None:
        self._bindings.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        slot.tokens, slot.copied, slot.origin = [], [], object()

    def holds_idle(self) -> bool:
        """Return whether a slot holds a prefix that no sequence runs on."""
        return bool(self._idle())

    def evict(self) -> None:
        """Clear the least recently used idle prefix."""
        self.clear(min(self._idle(), key=lambda slot: slot.used))

    def _idle(self) -> list[Slot]:
        return [slot for slot in (*self.free_slots(), self.template_slot) if slot.tokens]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens `a` and `b` share from the start. Compares slices, so it runs mostly in C."""
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
