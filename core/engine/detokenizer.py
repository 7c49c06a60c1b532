"""Turn the bytes of a sequence's tokens into text: whole characters only, and no stop strings."""

from __future__ import annotations

import codecs


class TextStream:
    """Takes token bytes and returns the text that can be sent so far.

    The bytes of an incomplete character are held back, and dropped if it is never completed. Text that may begin a
    stop string is held back until that is decided. Bytes that are not UTF-8 become U+FFFD.
    """

    __slots__ = ("_decode", "_longest", "_stops", "_withheld", "stopped")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._withheld = ""
        self.stopped = False  # a stop string was found; no more text comes

    def push(self, piece: bytes) -> str:
        """Add the bytes of a token. Return the text that can be sent now."""
        text = self._decode(piece)
        if not self._stops:
            return text
        if self.stopped:
            return ""
        # 1) A stop string ends the text, the earliest one if there are several.
        text = self._withheld + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped = True
            self._withheld = ""
            return text[: min(places)]
        # 2) Hold back what may begin one.
        length = len(text) - self._may_begin_stop(text)
        self._withheld = text[length:]
        return text[:length]

    def finish(self) -> str:
        """Return the text that was held back: it is no stop string after all. Drops an incomplete character."""
        text, self._withheld = self._withheld, ""
        return text

    def _may_begin_stop(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
