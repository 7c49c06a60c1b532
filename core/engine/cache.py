"""Cache: the slots of llama.cpp's KV memory, who has them, and which prefixes they still hold.

The memory is unified: slots share its cells, so copying a prefix from one slot to another costs no cells and no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context, Memory
    from core.engine.generation import Sequence


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


class Cache:
    """Owned by the engine thread. `trimmable` is False for recurrent models: their state knows only its end. `window`
    is how many tokens a sliding-window layer sees, 0 if there is none.
    """

    def __init__(self, bindings: Bindings, context: Context, n_slots: int, *, trimmable: bool, window: int = 0) -> None:
        self._bindings = bindings
        # Not None: that is checked when the context is made.
        self._memory = cast("Memory", bindings.llama_get_memory(context))
        self._trimmable = trimmable
        self._window = window
        self._clock = 0
        self.slots = [Slot(slot_id) for slot_id in range(n_slots)]
        self.template_slot = Slot(
            n_slots
        )  # holds what the template begins with, for all tenants; no sequence runs in it

    def free_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.sequence is None]

    def used(self) -> int:
        """Cells of the sequences that run. Idle prefixes do not count: they give way."""
        return count_cells(slot.spans() for slot in self.slots if slot.sequence is not None)

    def needed(self, sequence: Sequence) -> int:
        """Cells that `sequence` needs beyond `used`, if it is admitted now."""
        source, shared = self._find(sequence)
        places = [slot.spans() for slot in self.slots if slot.sequence is not None]
        before = count_cells(places)
        if source is not None:
            places.append(source.spans(shared))
        return count_cells(places) - before + len(sequence.tokens) - shared

    def take(self, sequence: Sequence) -> int:
        """Give `sequence` a free slot with as much of its tokens as the tenant's slots hold. Returns that many.

        At least one token is left to decode, or there would be no logits.
        """
        free = self.free_slots()
        source, shared = self._find(sequence)
        if source in free and self._superseded(source, shared):
            target = source
        else:
            # The source is busy, or holds something else worth keeping: it stays as it is.
            target = min(free, key=lambda slot: (len(slot.tokens) > 0, slot.used))
            if target is not source:
                self.clear(target)
                if source is not None and shared:
                    self._bindings.llama_memory_seq_cp(self._memory, source.id, target.id, 0, shared)
                    target.tokens = source.tokens[:shared]
                    target.copied = source.spans(shared)
        if len(target.tokens) > shared:
            self.trim(target, shared)
        self._clock += 1
        target.used = self._clock
        target.n_prompt = sequence.n_prompt
        target.tenant = sequence.request.tenant
        target.sequence = sequence
        sequence.slot = target
        return len(target.tokens)

    def _find(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds the longest beginning of `sequence`, and how long that is."""
        tenant, tokens = sequence.request.tenant, sequence.tokens
        source, shared = None, 0
        for slot in (*self.slots, self.template_slot):
            if slot.tokens and (slot.tenant == tenant or slot is self.template_slot):
                length = min(common_prefix(slot.tokens, tokens), len(tokens) - 1)
                if not self._trimmable and (length != len(slot.tokens) or slot.sequence is not None):
                    continue
                if length > shared and self._holds_window(slot, length):
                    source, shared = slot, length
        return source, shared

    def _holds_window(self, slot: Slot, length: int) -> bool:
        """Whether a sliding window that ends at `length` tokens is still there.

        llama.cpp gives the cells of a sequence that its window has passed to others, the oldest first, also with
        `swa_full`. For the sequence itself that is no loss, but cut back to `length` it would see a hole.
        """
        if not self._window:
            return True
        oldest = int(self._bindings.llama_memory_seq_pos_min(self._memory, slot.id))
        return oldest <= max(0, length - self._window + 1)

    @staticmethod
    def _superseded(slot: Slot, shared: int) -> bool:
        """Whether little is lost by cutting `slot` back to `shared` tokens: it holds few more, or this is its prompt.

        Where a repeated prompt lies matters: in the same cells it adds up in the same order, so that the same seed
        gives the same text (floats added up in another order; in other cells a logprob moved by up to 0.02).
        """
        return shared * 2 >= len(slot.tokens) or shared >= slot.n_prompt - 1

    def release(self, sequence: Sequence) -> None:
        """The slot is free again; what it holds stays for the next request with that prefix."""
        if sequence.slot is not None:
            sequence.slot.sequence = None
            sequence.slot = None

    def trim(self, slot: Slot, length: int) -> None:
        """Forget all beyond `length` tokens, also what an aborted decode left there."""
        if self._bindings.llama_memory_seq_rm(self._memory, slot.id, length, -1):
            if length < len(slot.tokens):
                # What comes next lies in other cells than what another slot may have copied from here.
                slot.copied, slot.origin = slot.spans(length), object()
                del slot.tokens[length:]
        else:
            self.clear(slot)

    def clear(self, slot: Slot) -> None:
        self._bindings.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        slot.tokens, slot.copied, slot.origin = [], [], object()

    def holds_idle(self) -> bool:
        """Whether a prefix is held that no sequence runs on."""
        return bool(self._idle())

    def evict(self) -> None:
        """Forget the idle prefix that was not used for longest."""
        self.clear(min(self._idle(), key=lambda slot: slot.used))

    def _idle(self) -> list[Slot]:
        return [slot for slot in (*self.free_slots(), self.template_slot) if slot.tokens]


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
