"""Report whether a model can answer, what it is doing, and what to do next."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from core.engine.interface import LoadedEngine
from core.host import HostState, Status
from core.loader import Loading
from core.service import Service


class LoadingReport(Struct):
    """A running load. `total_bytes` is 0 and `percent` null while the size is unknown."""

    phase: str
    model: str
    done_bytes: int
    total_bytes: int
    percent: int | None


class EmbeddingHealth(Struct):
    """The state of the embedding model, which its first request loads. `engine` has its counters when it is loaded."""

    status: Status
    model: str | None
    loading: LoadingReport | None
    error: str | None
    leases: int
    engine: dict[str, Any] | UnsetType = UNSET


class Health(Struct, kw_only=True):
    """A client without a key gets `status`, `model` and `hint`. `engine` has the counters of a loaded model.

    `embeddings` is there with EMBEDDING_MODEL_PATH.
    """

    status: Status
    model: str | None
    loading: LoadingReport | UnsetType | None = UNSET
    error: str | UnsetType | None = UNSET
    hint: str
    leases: int | UnsetType = UNSET
    uptime_s: float | UnsetType = UNSET
    engine: dict[str, Any] | UnsetType = UNSET
    embeddings: EmbeddingHealth | UnsetType = UNSET


async def health(service: Service, *, wait: float | None = None, details: bool = True) -> Health:
    """Return the state, and with `details` everything that a client with a key may see.

    With `wait`, load the model if it is not loaded, and return when it is ready, has failed, or after `wait` seconds.
    """
    state = service.host.state() if wait is None else await service.host.wait_ready(wait)
    if not details:
        return Health(status=state.status, model=state.model, hint=_public_hint(state))
    return Health(
        status=state.status,
        model=state.model,
        loading=loading_report(state.loading),
        error=state.error,
        hint=hint(state),
        leases=state.leases,
        uptime_s=round(service.timeline.now(), 1),
        engine=UNSET if state.engine is None else state.engine.stats(),
        embeddings=UNSET if service.embedder is None else _embedding_health(service.embedder.state()),
    )


def _embedding_health(state: HostState[LoadedEngine]) -> EmbeddingHealth:
    stats = UNSET if state.engine is None else state.engine.stats()
    loading = loading_report(state.loading)
    return EmbeddingHealth(state.status, state.model, loading, state.error, state.leases, stats)


def loading_report(loading: Loading | None) -> LoadingReport | None:
    if loading is None:
        return None
    return LoadingReport(loading.phase, loading.model, loading.done, loading.total, loading.percent)


def hint(state: HostState[LoadedEngine]) -> str:
    """Say what to do next, to a client that may use the server."""
    if state.status == "ready":
        return "POST /v1/chat/completions."
    if state.loading is not None:
        return "Wait for the model: GET /health?wait=30 returns as soon as it is ready."
    if state.error is not None:
        return "Fix the problem in `error`, then restart or POST /reload. The next request also retries."
    if state.status == "available":
        return "The first request loads the model. GET /health?wait=30 loads it now."
    return (
        "No model is configured. Set MODEL_PATH, or AUTO_REPO_ID and AUTO_FILENAME, and restart; "
        "or POST /load to download a model, then POST /reload with its path."
    )


def _public_hint(state: HostState[LoadedEngine]) -> str:
    if state.status == "ready":
        return "Ready."
    if state.status == "available":
        return "The first request loads the model."
    return "No model is loaded."
