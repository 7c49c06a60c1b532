"""The objects that all operations use. `adapters.wiring` builds them once and passes them explicitly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.metrics import Metrics
from core.response_store import ResponseStore

if TYPE_CHECKING:
    from core.downloads import Downloads
    from core.engine.interface import Embedder, Engine
    from core.host import Host
    from core.settings import Settings
    from core.store.store import Store
    from core.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Service:
    settings: Settings
    store: Store
    host: Host[Engine]
    timeline: Timeline
    downloads: Downloads
    metrics: Metrics = field(default_factory=Metrics)
    embedder: Host[Embedder] | None = None  # with EMBEDDING_MODEL_PATH
    responses: ResponseStore = field(default_factory=ResponseStore)

    async def close(self, grace: float) -> None:
        """Close the hosts: wait up to `grace` seconds for running requests, then cancel them and free the engines."""
        hosts = [self.host.close(grace)]
        if self.embedder is not None:
            hosts.append(self.embedder.close(grace))
        await asyncio.gather(*hosts)
