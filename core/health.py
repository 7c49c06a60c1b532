"""Health: is there a model that can answer, what is it doing, and what to do next."""

from __future__ import annotations

from typing import Any

from core.host import HostState
from core.loader import Loading
from core.service import Service


async def health(service: Service, *, wait: float | None = None, details: bool = True) -> dict[str, Any]:
    """The state in words. With `wait` the model is loaded if it is not, and the answer comes when it is ready, has
    failed, or after `wait` seconds. Without `details` only what a stranger may know."""
    state = service.host.state() if wait is None else await service.host.wait_ready(wait)
    if not details:
        return {"status": state.status, "model": state.model, "hint": _stranger_hint(state)}
    answer: dict[str, Any] = {
        "status": state.status,
        "model": state.model,
        "loading": progress(state.loading),
        "error": state.error,
        "hint": hint(state),
        "leases": state.leases,
        "uptime_s": round(service.timeline.now(), 1),
    }
    if state.engine is not None:
        answer["engine"] = state.engine.stats()
    return answer


def progress(loading: Loading | None) -> dict[str, Any] | None:
    if loading is None:
        return None
    return {
        "phase": loading.phase,
        "model": loading.model,
        "done_bytes": loading.done,
        "total_bytes": loading.total,
        "percent": loading.percent,
    }


def hint(state: HostState) -> str:
    """What to do next, for someone who may use the server."""
    if state.status == "ready":
        return "POST /v1/chat/completions."
    if state.loading is not None:
        return "Wait: GET /health?wait=30 answers as soon as the model is ready."
    if state.error is not None:
        return "Mend what error says, then restart or POST /reload; a later request tries the load again."
    if state.status == "available":
        return "The first request loads the model; GET /health?wait=30 does it now."
    return (
        "No model: set MODEL_PATH, or AUTO_REPO_ID and AUTO_FILENAME, and restart; "
        "or POST /load to download one, then POST /reload with its path."
    )


def _stranger_hint(state: HostState) -> str:
    if state.status == "ready":
        return "Ready."
    if state.status == "available":
        return "The model is loaded at the first request."
    return "No model is served."
