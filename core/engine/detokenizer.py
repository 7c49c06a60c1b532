"""TextStream: a sequence's token bytes as text. Only whole characters leave, and stop strings never do."""

from __future__ import annotations

import codecs


class TextStream:
    """Feed it token bytes; it returns what may be shown so far.

    Bytes of a character that is not complete yet are held back, and dropped if it never is. Text that may be the
    beginning of a stop string is held back until that is decided. Bytes that cannot be UTF-8 become U+FFFD.
    """

    __slots__ = ("_decode", "_held", "_longest", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False  # a stop string was found; nothing more will come

    def push(self, piece: bytes) -> str:
        """Text that can leave now that `piece` has come."""
        text = self._decode(piece)
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._may_begin_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and is no stop string after all. An incomplete character is dropped."""
        text, self._held = self._held, ""
        return text

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
