"""Store in the mirror the commit that a branch or tag last had at Hugging Face."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from core.store.reference import is_commit

SKEW_S = 300.0  # a time further in the future comes from a wrong clock


@dataclass(frozen=True, slots=True)
class Ref:
    commit: str
    resolved_at: float  # Unix time on the machine that asked Hugging Face

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Ref | None:
        """Return the ref, or None if `data` is not one."""
        try:
            fields = json.loads(data)
            ref = cls(fields["commit"], float(fields["resolved_at"]))
        except (ValueError, KeyError, TypeError):
            return None
        return ref if isinstance(ref.commit, str) and is_commit(ref.commit) else None

    def outlasts(self, other: Ref, now: float) -> bool:
        """Return whether this ref stays when `other` is offered: a ref never goes back in time."""
        return other.resolved_at <= self.resolved_at <= now + SKEW_S
