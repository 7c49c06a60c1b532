"""Hold the tokens of one decode call, of several slots, in arrays that llama.cpp reads directly."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.engine.bindings import Bindings


class Batch:
    """Room for `size` tokens, reused in every step.

    Whole slices are assigned, which ctypes does in C. Filling `llama_batch` element by element costs about 0.4 us a
    token.
    """

    def __init__(self, bindings: Bindings, size: int, n_slots: int) -> None:
        self.size = size
        self.length = 0
        self._tokens: Any = (ctypes.c_int32 * size)()
        self._positions: Any = (ctypes.c_int32 * size)()
        self._counts = (ctypes.c_int32 * size)(*[1] * size)
        self._logits: Any = (ctypes.c_int8 * size)()
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slot_ids = [(ctypes.c_int32 * 1)(slot) for slot in range(n_slots)]
        self._slot_pointers = [ctypes.cast(slot_id, pointer) for slot_id in self._slot_ids]
        self._slots: Any = (pointer * size)()
        self.native = bindings.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._slots,
            logits=self._logits,
        )

    def clear(self) -> None:
        self.length = 0

    def add(self, slot: int, tokens: list[int], position: int, *, logits: bool) -> int:
        """Append `tokens` of `slot` from `position` on. With `logits`, compute those of the last token.

        Returns the last token's index in the batch, which is where its logits are after the decode.
        """
        start, end = self.length, self.length + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = range(position, position + len(tokens))
        self._slots[start:end] = [self._slot_pointers[slot]] * len(tokens)
        self._logits[start:end] = bytes(len(tokens))
        if logits:
            self._logits[end - 1] = 1
        self.length = self.native.n_tokens = end
        return end - 1
