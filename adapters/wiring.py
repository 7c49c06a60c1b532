"""Wiring: the composition root. Every entry point calls `build`; nobody else puts a Service together."""

from __future__ import annotations

from core.host import Host
from core.service import Service
from core.settings import Settings
from core.store.store import Store
from core.timeline import Timeline


def build(settings: Settings, timeline: Timeline | None = None) -> Service:
    """Settings to Service. Touches neither network nor model; `service.host.start()` does."""
    timeline = timeline or Timeline()
    store = Store(settings)
    host = Host(settings, store, timeline)
    return Service(settings, store, host, timeline)
