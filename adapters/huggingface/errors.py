"""Translate huggingface_hub's errors into error messages for clients. The original text goes to the log."""

from __future__ import annotations

import logging

from adapters.transfer.retry import is_transient
from core.errors import ApiError, InvalidRequest, ModelNotFound, ModelUnavailable
from core.store.reference import HuggingFace

logger = logging.getLogger("slm.huggingface")


def explain(error: Exception | None, reference: HuggingFace, path: str, endpoint: str) -> ApiError:
    """Return the error for a client, and log the original."""
    from huggingface_hub import errors

    where = f"{reference.repo_id} at {endpoint}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The text of an error with a status contains the URL, and a URL of the CDN contains its signature.
    logger.warning(
        "Hugging Face failed for %s: %s %s", reference, type(error).__name__, error if status is None else status
    )
    match error:
        case errors.GatedRepoError():
            return InvalidRequest(
                f"{reference.repo_id} is gated: accept its terms on the Hub and set HF_TOKEN to that account's token.",
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
            return InvalidRequest(f"{reference.repo_id} was disabled by Hugging Face.", param="repo_id")
        case errors.OfflineModeIsEnabled():
            return ModelUnavailable(
                "HF_HUB_OFFLINE is set and the model is not in MODELS_DIR: unset it, or copy the file there.",
                retry_after=None,
            )
    if status in (401, 403):
        return InvalidRequest(
            f"Hugging Face refused access to {reference.repo_id}: HF_TOKEN is missing, invalid or lacks permission.",
            param="repo_id",
        )
    if status == 404:
        return ModelNotFound(f"{where} has no file {path!r}.", param="filename")
    if status is not None and status < 500 and status not in (408, 416, 429):
        return InvalidRequest(f"Hugging Face answered {status} for {path!r} of {reference.repo_id}.", param="repo_id")
    reason = f"it answered {status}" if status is not None else "the connection failed or stalled"
    return ModelUnavailable(
        f"{path!r} could not be read from {endpoint}: {reason}. Try again; the download resumes where it stopped.",
        retry_after=30 if status == 429 else 10,
    )


def is_temporary(error: Exception | None) -> bool:
    """Return whether the same request may succeed later. None stands for a body that ended early.

    Errors without a status are broken connections and timeouts. After a 416 the download resumes from its new length.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status == 416 or is_transient(status)
