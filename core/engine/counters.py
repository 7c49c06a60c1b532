"""Counters: what an engine has done since the load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_calls: int = 0
    paused: int = 0  # sequences that lost their cells and were read again
    aborted: int = 0  # decode calls that nobody wanted any more
