"""The hub's errors in our words: what a client is told, while huggingface_hub's own text goes to the log."""

from __future__ import annotations

import logging

from core.errors import ApiError, InvalidRequest, ModelNotFound, ModelUnavailable
from core.store.reference import HuggingFace

logger = logging.getLogger("slm.huggingface")


def explain(error: Exception | None, reference: HuggingFace, path: str, endpoint: str) -> ApiError:
    """What went wrong, in our words; the hub's go to the log."""
    from huggingface_hub import errors

    where = f"{reference.repo_id} at {endpoint}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The text of an error with a status holds the URL, and a URL of the CDN its signature.
    logger.warning("the hub failed for %s: %s %s", reference, type(error).__name__, error if status is None else status)
    match error:
        case errors.GatedRepoError():
            return InvalidRequest(
                f"{reference.repo_id} is gated: accept its terms there and set HF_TOKEN to that account's token.",
                param="repo_id",
            )
        case errors.RepositoryNotFoundError():
            return ModelNotFound(
                f"There is no repository {where}, or it is private: check 'repo_id' and HF_TOKEN.",
                param="repo_id",
            )
        case errors.RevisionNotFoundError():
            return ModelNotFound(f"{where} has no revision {reference.revision!r}.", param="revision")
        case errors.EntryNotFoundError():
            return ModelNotFound(f"{where} has no file {path!r} in revision {reference.revision!r}.", param="filename")
        case errors.DisabledRepoError():
            return InvalidRequest(f"{reference.repo_id} was disabled by the hub.", param="repo_id")
        case errors.OfflineModeIsEnabled():
            return ModelUnavailable(
                "HF_HUB_OFFLINE is set and the model is not here: unset it, or put the file into MODELS_DIR.",
                retry_after=None,
            )
    if status in (401, 403):
        return InvalidRequest(
            f"The hub refused access to {reference.repo_id}: HF_TOKEN is missing, wrong or without that right.",
            param="repo_id",
        )
    if status == 404:
        return ModelNotFound(f"{where} has no file {path!r}.", param="filename")
    if status is not None and status < 500 and status not in (408, 416, 429):
        return InvalidRequest(f"The hub answered {status} for {path!r} of {reference.repo_id}.", param="repo_id")
    reason = f"it answered {status}" if status is not None else "the connection failed or stalled"
    return ModelUnavailable(
        f"{path!r} could not be read from {endpoint}: {reason}. What arrived is kept; try again.",
        retry_after=30 if status == 429 else 10,
    )


def is_transient(error: Exception | None) -> bool:
    """Breaks, timeouts and servers in trouble are; a 404 is not. None: the body ended early without an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 416, 429) or status >= 500
