"""Reload: serve another local model, or the same one loaded in another way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from msgspec import Meta, Struct

from core.errors import InvalidRequest
from core.host import config_of
from core.models import active
from core.service import Service
from core.store.reference import File, parse


class ReloadRequest(Struct, forbid_unknown_fields=True):
    """What is left out comes from the settings; without `model_path` it is the model served now."""

    model_path: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    n_ctx: Annotated[int, Meta(ge=64, le=1 << 20)] | None = None
    n_threads: Annotated[int, Meta(ge=0, le=512)] | None = None
    n_batch: Annotated[int, Meta(ge=8, le=8192)] | None = None
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=9999)] | None = None
    verbose: bool | None = None


async def reload(service: Service, request: ReloadRequest) -> dict[str, Any]:
    """Swap: new requests go to the new model, running answers finish on the old one, which stays if the new one fails.

    Raises InvalidRequest or ModelNotFound (a path that is outside, missing or no GGUF), or what the engine says.
    """
    reference = await _reference(service, request.model_path)
    given = {
        name: value
        for name in ("n_ctx", "n_threads", "n_batch", "n_gpu_layers", "verbose")
        if (value := getattr(request, name)) is not None
    }
    state = await service.host.swap(reference, replace(config_of(service.settings), **given))
    return {
        "status": state.status,
        "model": state.model,
        "active": active(service, state, paths=True),
        "hint": "POST /v1/chat/completions.",
    }


async def _reference(service: Service, model_path: str | None) -> File | None:
    """A local file, looked up by the store, which keeps what a client names inside MODELS_DIR. None: the model served
    now, wherever it lies; one in memory has no path that could be opened again."""
    if model_path is None:
        if service.host.state().path is None:
            raise InvalidRequest(
                "'model_path' is missing, and no model is configured; GET /models lists those that are here.",
                param="model_path",
            )
        return None
    reference = parse(model_path)
    if isinstance(reference, File):
        return File(str(await asyncio.to_thread(service.store.locate, model_path)))
    present = await asyncio.to_thread(service.store.present, reference)
    if present is None:
        raise InvalidRequest(f"{model_path[:200]!r} is not on this machine; POST /load brings it.", param="model_path")
    return File(str(present))
