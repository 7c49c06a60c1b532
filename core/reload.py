"""Switch to another model or another configuration while requests are running."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from core.errors import InvalidRequest
from core.health import hint
from core.host import Status, config_of
from core.models import ActiveModel, active
from core.service import Service
from core.store.reference import File, parse


class ReloadRequest(Struct, forbid_unknown_fields=True):
    """Absent fields keep the values of the settings. Without `model_path` the served model is loaded again."""

    model_path: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    n_ctx: Annotated[int, Meta(ge=64, le=1 << 20)] | None = None
    n_threads: Annotated[int, Meta(ge=0, le=512)] | None = None
    n_batch: Annotated[int, Meta(ge=8, le=8192)] | None = None
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=9999)] | None = None
    verbose: bool | None = None


class ReloadResult(Struct):
    status: Status
    model: str | None
    active: ActiveModel
    hint: str


async def reload(service: Service, request: ReloadRequest) -> ReloadResult:
    """Swap the model. New requests use the new model, running ones finish on the old one.

    If the new model fails to load, the old one stays. Raises InvalidRequest or ModelNotFound for a path that is
    outside MODELS_DIR, missing or not a GGUF file, and what the engine raises.
    """
    reference = await _reference(service, request.model_path)
    overrides = {
        name: value
        for name in ("n_ctx", "n_threads", "n_batch", "n_gpu_layers", "verbose")
        if (value := getattr(request, name)) is not None
    }
    state = await service.host.swap(reference, replace(config_of(service.settings), **overrides))
    return ReloadResult(state.status, state.model, active(service, state, paths=True), hint(state))


async def _reference(service: Service, model_path: str | None) -> File | None:
    """Return the local file to load, or None for the served model, which may be in memory and have no path.

    The store rejects paths outside MODELS_DIR.
    """
    if model_path is None:
        if service.host.state().path is None:
            raise InvalidRequest(
                "'model_path' is missing, and no model is configured; GET /models lists the models on this machine.",
                param="model_path",
            )
        return None
    reference = parse(model_path)
    if isinstance(reference, File):
        return File(str(await asyncio.to_thread(service.store.locate, model_path)))
    present = await asyncio.to_thread(service.store.present, reference)
    if present is None:
        raise InvalidRequest(
            f"{model_path[:200]!r} is not on this machine; POST /load downloads it.", param="model_path"
        )
    return File(str(present))
