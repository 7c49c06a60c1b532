"""Ref: what a branch or tag meant when somebody asked the hub last, as the mirror keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from core.store.reference import is_commit

SKEW_S = 300.0  # a time so far ahead of ours comes from a wrong clock


@dataclass(frozen=True, slots=True)
class Ref:
    commit: str
    resolved_at: float  # seconds since 1970, on the clock of the machine that asked the hub

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Ref | None:
        """None: not a ref."""
        try:
            fields = json.loads(data)
            ref = cls(fields["commit"], float(fields["resolved_at"]))
        except (ValueError, KeyError, TypeError):
            return None
        return ref if isinstance(ref.commit, str) and is_commit(ref.commit) else None

    def outlasts(self, other: Ref, now: float) -> bool:
        """Whether this one stays where `other` is offered: a ref never goes back in time."""
        return other.resolved_at <= self.resolved_at <= now + SKEW_S
