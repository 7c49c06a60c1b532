"""Wiring: the composition root. Every entry point calls `build`; nobody else puts a Service together."""

from __future__ import annotations

from pathlib import Path

from core.host import Host
from core.service import Service
from core.settings import Settings
from core.store.embedded import embedded_model
from core.store.store import Store
from core.timeline import Timeline


def build(settings: Settings, timeline: Timeline | None = None) -> Service:
    """Settings to Service. Touches neither network nor model; `service.host.start()` does."""
    timeline = timeline or Timeline()
    store = Store(settings.models_dir, allowed=_allowed(settings), target=settings.model_target)
    host = Host(settings, store, timeline)
    return Service(settings, store, host, timeline)


def _allowed(settings: Settings) -> tuple[Path, ...]:
    """Files beyond MODELS_DIR that may be served: the configured one and the embedded one."""
    configured = settings.model_path
    paths = () if configured is None or "://" in configured else (Path(configured).expanduser(),)
    embedded = embedded_model() if settings.embedded_model == "auto" else None
    return paths if embedded is None else (*paths, embedded)
