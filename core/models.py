"""Report the served model, the models on this machine, and how the server started."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from core.engine.interface import Embedder, LoadedEngine, ModelCard
from core.health import LoadingReport, hint, loading_report
from core.host import Host, HostState, Status, config_of
from core.service import Service
from core.session import check_model


class ModelEntry(Struct):
    """OpenAI's model object."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "slm-api-server"


class ModelList(Struct):
    """OpenAI's list of models."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class AnthropicModel(Struct):
    """Anthropic's model object. `created_at` is RFC 3339."""

    id: str
    display_name: str
    created_at: str
    type: Literal["model"] = "model"


class AnthropicModelList(Struct):
    data: list[AnthropicModel]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


class ActiveConfig(Struct, kw_only=True):
    """How the model is or would be loaded. `model_path` is for administrators only."""

    model_path: str | UnsetType | None = UNSET
    n_ctx: int
    n_batch: int
    n_threads: int
    n_gpu_layers: int
    n_parallel: int
    verbose: bool


class ModelDetails(Struct):
    """What llama.cpp reads from the model's file. `chat_template` says where the template comes from."""

    description: str
    architecture: str
    n_params: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    size_bytes: int
    chat_template: str


class ActiveModel(Struct, kw_only=True):
    """The model that is loaded, or that the next request would load. `path` is for administrators only."""

    name: str | None
    path: str | UnsetType | None = UNSET
    basename: str | None
    exists: bool
    loaded: bool
    state: Status
    loading: LoadingReport | None
    error: str | None
    config: ActiveConfig
    model: ModelDetails | UnsetType = UNSET


class EmbeddingModel(Struct, kw_only=True):
    """The model of EMBEDDING_MODEL_PATH. The last three fields are there when it is loaded, `path` for administrators.

    `pooling` is "mean", "cls", "last" or "none", or "rank" for a reranking model. `n_ctx` bounds a text's tokens.
    """

    name: str | None
    path: str | UnsetType | None = UNSET
    loaded: bool
    state: Status
    loading: LoadingReport | None
    error: str | None
    pooling: str | UnsetType = UNSET
    dimensions: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET


class AvailableModel(Struct, kw_only=True):
    """A model in MODELS_DIR. `path` is for administrators only."""

    name: str
    path: str | UnsetType = UNSET
    size_bytes: int


class BootInfo(Struct, kw_only=True):
    """Why this model was selected, and the phases of the start. The paths are for administrators only."""

    chosen_by: str | None
    reason: str | None
    reference: str | UnsetType | None = UNSET
    path: str | UnsetType | None = UNSET
    phases: dict[str, dict[str, float | None]]


class Models(Struct, kw_only=True):
    """`data` is the list of `GET /v1/models`, so that clients whose base_url lacks /v1 understand this one too."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    active: ActiveModel
    available: list[AvailableModel]
    hint: str
    boot_info: BootInfo
    embeddings: EmbeddingModel | UnsetType = UNSET  # with EMBEDDING_MODEL_PATH


async def models(service: Service, *, paths: bool = False) -> Models:
    """Return the active model, all models in MODELS_DIR and the phases of the start. `paths` adds paths."""
    available = await asyncio.to_thread(service.store.list)
    state = service.host.state()
    boot = service.host.boot
    return Models(
        data=model_list(service).data,
        active=active(service, state, paths=paths),
        available=[
            AvailableModel(name=model.name, path=str(model.path) if paths else UNSET, size_bytes=model.size_bytes)
            for model in available
        ],
        hint=hint(state),
        boot_info=BootInfo(
            chosen_by=boot["chosen_by"],
            reason=boot["reason"],
            reference=boot["reference"] if paths else UNSET,
            path=boot["path"] if paths else UNSET,
            phases=service.timeline.report(),
        ),
        embeddings=UNSET if service.embedder is None else _embedding_model(service.embedder, paths=paths),
    )


def _embedding_model(embedder: Host[Embedder], *, paths: bool) -> EmbeddingModel:
    state = embedder.state()
    report = EmbeddingModel(
        name=state.model,
        path=state.path if paths else UNSET,
        loaded=state.engine is not None,
        state=state.status,
        loading=loading_report(state.loading),
        error=state.error,
    )
    if (engine := state.engine) is not None:
        report.pooling, report.dimensions, report.n_ctx = engine.pooling, engine.n_dimensions, engine.card.n_ctx
    return report


def active(service: Service, state: HostState[LoadedEngine], *, paths: bool) -> ActiveModel:
    path = state.path
    config = state.engine.config if state.engine is not None else config_of(service.settings)
    active_config = msgspec.convert(config, ActiveConfig, from_attributes=True)
    active_config.model_path = path if paths else UNSET
    return ActiveModel(
        name=state.model,
        path=path if paths else UNSET,
        basename=Path(path).name if path else None,
        exists=path is not None and Path(path).exists(),
        loaded=state.engine is not None,
        state=state.status,
        loading=loading_report(state.loading),
        error=state.error,
        config=active_config,
        model=UNSET if state.engine is None else _details(state.engine.card),
    )


def _details(card: ModelCard) -> ModelDetails:
    return ModelDetails(
        description=card.description,
        architecture=card.architecture,
        n_params=card.n_params,
        n_vocab=card.n_vocab,
        n_ctx=card.n_ctx,
        n_ctx_train=card.n_ctx_train,
        size_bytes=card.size_bytes,
        chat_template="gguf" if card.chat_template else "chatml (the model has no template)",
    )


def model_list(service: Service) -> ModelList:
    """Return the served model and the embedding model, each under its name and its aliases."""
    chat, embedding = names(service), embedding_names(service)
    entries = [ModelEntry(name, _created(service.host.state().path)) for name in chat]
    if service.embedder is not None:
        created = _created(service.embedder.state().path)
        entries += [ModelEntry(name, created) for name in embedding if name not in chat]
    return ModelList(entries)


def anthropic_list(service: Service) -> AnthropicModelList:
    """Return the same models in Anthropic's shape."""
    models = [
        AnthropicModel(entry.id, entry.id, datetime.fromtimestamp(entry.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        for entry in model_list(service).data
    ]
    return AnthropicModelList(models, models[0].id if models else None, models[-1].id if models else None)


def model_entry(service: Service, name: str) -> ModelEntry:
    """Return the entry of one name. Raises ModelNotFound with the names that exist."""
    for entry in model_list(service).data:
        if entry.id == name:
            return entry
    check_model(service, name)  # "*" accepts other names
    return ModelEntry(name, _created(service.host.state().path))


def names(service: Service) -> tuple[str, ...]:
    """Return the names that a chat's `model` may have. With "*" in MODEL_ALIASES any other name works too."""
    return _names(service.host.state().model, service.settings.model_aliases)


def embedding_names(service: Service) -> tuple[str, ...]:
    """Return the names of the embedding model. With "*" in EMBEDDING_MODEL_ALIASES any other name works too."""
    if service.embedder is None:
        return ()
    return _names(service.embedder.state().model, service.settings.embedding_model_aliases)


def _names(model: str | None, aliases: tuple[str, ...]) -> tuple[str, ...]:
    if model is None:
        return ()
    return tuple(dict.fromkeys((model, *(alias for alias in aliases if alias != "*"))))


def _created(path: str | None) -> int:
    """Return the modification time of a model's file, or 0 without a local file. A GGUF has no creation date."""
    try:
        return 0 if path is None else int(Path(path).stat().st_mtime)
    except OSError:
        return 0
