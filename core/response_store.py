"""Store responses in memory, for clients that fetch or continue them. Each tenant sees its own only."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_AGE_S = 24 * 3600.0
OVERHEAD_BYTES = 1024  # of an entry, in addition to its texts


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`items` is the JSON of the whole conversation before the response, `response` that of the response."""

    items: bytes
    response: bytes
    created: float  # on the clock of `time.monotonic()`

    @property
    def size(self) -> int:
        return len(self.items) + len(self.response) + OVERHEAD_BYTES


class ResponseStore:
    """At most `max_bytes` of responses, none older than MAX_AGE_S. All methods belong to one event loop.

    Without room, the tenant with the most bytes loses the response that was not used for the longest time.
    """

    def __init__(self, max_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._tenants: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._sizes: dict[str, int] = {}

    @property
    def enabled(self) -> bool:
        return self._max_bytes > 0

    @property
    def size(self) -> int:
        """The bytes of all responses."""
        return sum(self._sizes.values())

    def put(self, tenant: str, identity: str, items: bytes, response: bytes) -> bool:
        """Store a response. Return False if it has no room even alone."""
        entry = StoredResponse(items, response, self._clock())
        if entry.size > self._max_bytes:
            return False
        self._expire()
        self.delete(tenant, identity)
        self._tenants.setdefault(tenant, OrderedDict())[identity] = entry
        self._sizes[tenant] = self._sizes.get(tenant, 0) + entry.size
        while self.size > self._max_bytes:
            largest = max(self._sizes, key=lambda name: self._sizes[name])
            self.delete(largest, next(iter(self._tenants[largest])))
        return True

    def get(self, tenant: str, identity: str) -> StoredResponse | None:
        """Return a response, which is now the one used last. None if there is no such response."""
        self._expire()
        entries = self._tenants.get(tenant, OrderedDict())
        entry = entries.get(identity)
        if entry is not None:
            entries.move_to_end(identity)
        return entry

    def latest(self, tenant: str) -> Iterator[StoredResponse]:
        """Yield the tenant's responses, the one used last first."""
        self._expire()
        yield from reversed(self._tenants.get(tenant, OrderedDict()).values())

    def delete(self, tenant: str, identity: str) -> bool:
        """Delete a response. Return whether there was one."""
        entry = self._tenants.get(tenant, OrderedDict()).pop(identity, None)
        if entry is None:
            return False
        self._sizes[tenant] -= entry.size
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._sizes[tenant]
        return True

    def _expire(self) -> None:
        oldest = self._clock() - MAX_AGE_S
        for tenant, entries in list(self._tenants.items()):
            for identity in [name for name, entry in entries.items() if entry.created < oldest]:
                self.delete(tenant, identity)
