"""ControlNames: where a text names a control token of the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable

# User-defined tokens are markup of a prompt ("<think>", "[TOOL_CALLS]") or ordinary text that a vocabulary holds in one
# piece: runs of white space, words, and in Gemma's the elements of HTML. The latter stay whole, as in training.
_BRACKETED = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_HTML = re.compile(
    r"</?(?:a|b|i|u|em|strong|sub|sup|code|span|div|img|iframe|body|html|footer|ul|ol|li|p|br|blockquote|h[1-6]"
    r"|table|caption|thead|tbody|tfoot|tr|th|td)>"
)


def is_markup(name: str) -> bool:
    """Whether a user-defined token of this name structures prompts, as a control token does."""
    return _BRACKETED.fullmatch(name) is not None and _HTML.fullmatch(name) is None


class ControlNames:
    """The names of a vocabulary's control tokens. Those of one character are left out: they cannot be cut in two."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name for name in names if len(name) > 1)
        lengths: dict[str, set[int]] = {}
        for name in self._names:
            lengths.setdefault(name[:2], set()).add(len(name))
        self._lengths = {pair: tuple(sorted(each)) for pair, each in lengths.items()}
        firsts = "".join(sorted({name[0] for name in self._names}))
        self._first = re.compile(f"[{re.escape(firsts)}]") if firsts else None

    def starts(self, text: str) -> list[int]:
        """Where names begin, in rising order; overlapping ones, too."""
        if self._first is None or len(text) < 2:
            return []
        names, lengths = self._names, self._lengths
        starts = []
        for match in self._first.finditer(text):
            start = match.start()
            for length in lengths.get(text[start : start + 2], ()):
                if text[start : start + length] in names:
                    starts.append(start)
                    break
        return starts
