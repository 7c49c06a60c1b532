"""GET /metrics"""

from __future__ import annotations

from core.engine.interface import LoadedEngine
from core.metrics import CONTENT_TYPE, Load
from core.service import Service
from handlers.http import Request, Response


async def get_metrics(service: Service, request: Request) -> Response:
    """Return Prometheus text. It neither loads the model nor waits for it."""
    engine = service.host.state().engine
    text = service.metrics.text(None if engine is None else load_of(engine))
    return Response(200, (("content-type", CONTENT_TYPE),), text.encode())


def load_of(engine: LoadedEngine) -> Load:
    """Return what an engine is doing now. A model whose states do not grow is as full as its slots are."""
    stats = engine.stats()
    sequences, cells = stats["sequences"], stats["kv_cells"]
    used, total = (cells["used"], cells["total"]) if cells["total"] else (sequences["running"], sequences["total"])
    return Load(engine.card.name, sequences["running"], stats["queued"], used / total)
