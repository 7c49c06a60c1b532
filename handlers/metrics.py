"""GET /metrics"""

from __future__ import annotations

from core.engine.interface import Embedder, Engine
from core.metrics import CONTENT_TYPE, Load
from core.service import Service
from handlers.http import Request, Response


async def get_metrics(service: Service, request: Request) -> Response:
    """Return Prometheus text. This neither loads a model nor waits for one."""
    loads = []
    if (engine := service.host.state().engine) is not None:
        loads.append(load_of(engine))
    if service.embedder is not None and (embedder := service.embedder.state().engine) is not None:
        loads.append(embedder_load(embedder))
    return Response(200, (("content-type", CONTENT_TYPE),), service.metrics.text(loads).encode())


def load_of(engine: Engine) -> Load:
    """Return what an engine is doing now. A model whose states do not grow is as full as its slots are."""
    stats = engine.stats()
    sequences, cells = stats["sequences"], stats["kv_cells"]
    used, total = (cells["used"], cells["total"]) if cells["total"] else (sequences["running"], sequences["total"])
    return Load(engine.card.name, sequences["running"], stats["queued"], used / total)


def embedder_load(embedder: Embedder) -> Load:
    """Return what an embedding model is doing now. It computes one request at a time and keeps no KV cells."""
    outstanding = embedder.stats()["queued"]
    return Load(embedder.card.name, min(1, outstanding), max(0, outstanding - 1), 0.0)
