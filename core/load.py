"""Load: bring a model onto this machine. Does not switch to it; that is `core.reload`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta, Struct

from core.errors import InvalidRequest
from core.service import Service
from core.store.reference import S3, HuggingFace, parse

Progress = Callable[[int, int], None]  # (bytes done, bytes in all; 0 when unknown)


class LoadRequest(Struct, forbid_unknown_fields=True):
    """`repo_id` and `filename` (and a revision), or a `reference`: hf://org/repo/file.gguf@revision, s3://bucket/key."""

    repo_id: Annotated[str, Meta(max_length=200)] | None = None
    filename: Annotated[str, Meta(max_length=500)] | None = None
    revision: Annotated[str, Meta(max_length=200)] | None = None
    sha256: Annotated[str, Meta(max_length=64)] | None = None
    reference: Annotated[str, Meta(max_length=1000)] | None = None
    stream: bool | None = None


def to_reference(request: LoadRequest) -> HuggingFace | S3:
    """What is to be fetched. Raises InvalidRequest naming the field that is missing or wrong."""
    if request.reference is not None:
        if request.repo_id or request.filename or request.revision:
            raise InvalidRequest("Give 'reference' or 'repo_id' and 'filename', not both.", param="reference")
        try:
            reference = parse(request.reference)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=error.param or "reference") from None
        if not isinstance(reference, HuggingFace | S3):
            raise InvalidRequest(
                f"'reference' must start with hf:// or s3://, got {request.reference[:80]!r}; "
                "a file that is here needs no loading: POST /reload.",
                param="reference",
            )
        return reference
    for field in ("repo_id", "filename"):
        if not getattr(request, field):
            raise InvalidRequest(f"'{field}' is missing; it must be a string.", param=field)
    # The store's grammar of references is the one judge of names, so these go through it as well.
    try:
        reference = parse(f"hf://{request.repo_id}/{request.filename}@{request.revision or 'main'}")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=error.param or "repo_id") from None
    if not isinstance(reference, HuggingFace) or reference.repo_id != request.repo_id:
        raise InvalidRequest(f"'repo_id' must be 'org/name', got {str(request.repo_id)[:80]!r}.", param="repo_id")
    return reference


def to_sha256(request: LoadRequest) -> str | None:
    if request.sha256 is None:
        return None
    digest = request.sha256.lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise InvalidRequest("'sha256' must be 64 hexadecimal digits.", param="sha256")
    return digest


async def load(service: Service, request: LoadRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Fetch into MODELS_DIR and say what was done. `progress` is called in the download's thread.

    Cancelling this stops the download unless another request waits for it. Raises what `Downloads.fetch` raises.
    """
    reference, sha256 = to_reference(request), to_sha256(request)
    fetched = await service.downloads.fetch(reference, sha256=sha256, progress=progress)
    described: dict[str, Any] = (
        {"repo_id": reference.repo_id, "filename": reference.filename, "revision": reference.revision}
        if isinstance(reference, HuggingFace)
        else {"bucket": reference.bucket, "key": reference.key}
    )
    return {
        "status": fetched.status,
        **described,
        "commit": fetched.commit,
        "source": fetched.source,
        "path": str(fetched.path),
        "size_bytes": fetched.size_bytes,
        "sha256": fetched.sha256,
        "hint": f'POST /reload {{"model_path": "{fetched.path}"}} serves it.',
    }
