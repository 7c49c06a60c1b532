"""Models: what is served, what lies on this machine, and how the start went."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from core.health import hint, progress
from core.host import HostState, config_of
from core.service import Service
from core.session import check_model


async def models(service: Service, *, paths: bool = False) -> dict[str, Any]:
    """The active model with its state and config, every model in MODELS_DIR, and the phases of the start. Where they
    lie on this machine is said with `paths` only: a name is what a user needs.

    `data` is what `GET /v1/models` lists, so that a client whose base_url lacks /v1 understands this too.
    """
    available = await asyncio.to_thread(service.store.list)
    state = service.host.state()
    boot = service.host.boot
    if not paths:
        boot = {name: boot[name] for name in ("chosen_by", "reason")}
    return {
        "object": "list",
        "data": listing(service)["data"],
        "active": active(service, state, paths=paths),
        "available": [
            {"name": model.name, **({"path": str(model.path)} if paths else {}), "size_bytes": model.size_bytes}
            for model in available
        ],
        "hint": hint(state),
        "boot_info": {**boot, "phases": service.timeline.report()},
    }


def active(service: Service, state: HostState, *, paths: bool) -> dict[str, Any]:
    """The model that answers or would be loaded."""
    path = state.path
    config = state.engine.config if state.engine is not None else config_of(service.settings)
    answer: dict[str, Any] = {
        "name": state.model,
        **({"path": path} if paths else {}),
        "basename": Path(path).name if path else None,
        "exists": path is not None and Path(path).exists(),
        "loaded": state.engine is not None,
        "state": state.status,
        "loading": progress(state.loading),
        "error": state.error,
        "config": {
            **({"model_path": path} if paths else {}),
            "n_ctx": config.n_ctx,
            "n_batch": config.n_batch,
            "n_threads": config.n_threads,
            "n_gpu_layers": config.n_gpu_layers,
            "n_parallel": config.n_parallel,
            "verbose": config.verbose,
        },
    }
    if state.engine is not None:
        card = state.engine.card
        answer["model"] = {
            "description": card.description,
            "architecture": card.architecture,
            "n_params": card.n_params,
            "n_vocab": card.n_vocab,
            "n_ctx": card.n_ctx,
            "n_ctx_train": card.n_ctx_train,
            "size_bytes": card.size_bytes,
            "chat_template": "gguf" if card.chat_template else "chatml (the model brings none)",
        }
    return answer


def listing(service: Service) -> dict[str, Any]:
    """OpenAI's list: the model served, under its name and its aliases."""
    created = _created(service)
    return {"object": "list", "data": [_entry(name, created) for name in names(service)]}


def one(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's model object. Raises ModelNotFound with the names that exist."""
    check_model(service, name)
    return _entry(name, _created(service))


def names(service: Service) -> tuple[str, ...]:
    """What a client may put into `model`, besides anything if MODEL_ALIASES holds "*"."""
    state = service.host.state()
    if state.model is None:
        return ()
    return tuple(dict.fromkeys((state.model, *(name for name in service.settings.model_aliases if name != "*"))))


def _entry(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "slm-api-server"}


def _created(service: Service) -> int:
    """When the model's file was written, the closest thing to "created" that a GGUF has; 0 if it is not here."""
    path = service.host.state().path
    try:
        return 0 if path is None else int(Path(path).stat().st_mtime)
    except OSError:
        return 0
