"""Build fill-in-the-middle prompts: the text before and after a gap, and other files for context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from core.engine.interface import Engine, InfillTokens
from core.engine.prompt import text

_PROJECT = "project\n"  # the name of the repository, which no client sends
_UNTITLED = "untitled\n"  # the name of the file that has the gap
_SNIPPET = "\n\n--- snippet ---\n\n"  # between files, for vocabularies without a separator; llama-server's


class File(NamedTuple):
    filename: str
    text: str


def fill(tokens: InfillTokens, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the prompt whose continuation belongs between `before` and `after`."""
    return [tokens.prefix, *before, tokens.suffix, *after, tokens.middle]


def window(
    engine: Engine, tokens: InfillTokens, before: str, after: str, files: Sequence[File], n_predict: int
) -> tuple[int, ...]:
    """Return the prompt that fits into the context beside `n_predict` tokens, which get at most a quarter of it.

    The text near the gap comes first: three quarters of the room are for `before`, one for `after`, and what one of
    them leaves is for the other. Then come the files, the last ones first. Call it in a worker thread.
    """
    n_ctx = engine.card.n_ctx
    # 1) The room.
    start = text.bos(engine)
    room = n_ctx - min(max(1, n_predict), n_ctx // 4) - len(start) - 3
    # 2) The text around the gap.
    characters = room * text.LONGEST_TOKEN
    prefix = text.tokenize(engine, before[-characters:], param="input_prefix", continued=True)
    suffix = text.tokenize(engine, after[:characters], param="input_suffix", continued=True)
    n_suffix = min(len(suffix), max(room // 4, room - len(prefix)))
    n_prefix = min(len(prefix), room - n_suffix)
    gap = fill(tokens, prefix[len(prefix) - n_prefix :], suffix[:n_suffix])
    # 3) The files, as long as they fit.
    return (*start, *_context(engine, tokens, files, room - n_prefix - n_suffix), *gap)


def _context(engine: Engine, tokens: InfillTokens, files: Sequence[File], room: int) -> list[int]:
    """Return as many of the last files as fit into `room` tokens, in their order."""

    def named(filename: str) -> list[int]:
        if tokens.separator is None:
            return engine.tokenize(_SNIPPET, special=False, continued=True)
        return [tokens.separator, *text.tokenize(engine, filename, param="input_extra", continued=True)]

    head, tail = [], []
    if tokens.repository is not None:
        head = [tokens.repository, *engine.tokenize(_PROJECT, special=False, continued=True)]
    if tokens.separator is not None:
        tail = named(_UNTITLED)
    room -= len(head) + len(tail)
    chosen: list[list[int]] = []
    for file in reversed(files):
        if len(file.text) + len(file.filename) > max(0, room) * text.LONGEST_TOKEN:
            break
        part = named(f"{file.filename}\n") + text.tokenize(engine, file.text, param="input_extra", continued=True)
        if len(part) > room:
            break
        chosen.append(part)
        room -= len(part)
    if not chosen:
        return []
    return [*head, *(token for part in reversed(chosen) for token in part), *tail]
