"""Download a model to this machine. `core.reload` switches to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from core.errors import InvalidRequest
from core.service import Service
from core.store.reference import S3, HuggingFace, parse

Progress = Callable[[int, int], None]  # (downloaded bytes, total bytes or 0 if unknown)


class LoadRequest(Struct, forbid_unknown_fields=True):
    """Either `repo_id`, `filename` and an optional `revision`, or a `reference`.

    References are hf://org/repo/file.gguf@revision and s3://bucket/key.
    """

    repo_id: Annotated[str, Meta(max_length=200)] | None = None
    filename: Annotated[str, Meta(max_length=500)] | None = None
    revision: Annotated[str, Meta(max_length=200)] | None = None
    sha256: Annotated[str, Meta(max_length=64)] | None = None
    reference: Annotated[str, Meta(max_length=1000)] | None = None
    stream: bool | None = None


class LoadProgress(Struct):
    """One event of a streamed load. `total_bytes` is 0 while it is unknown."""

    done_bytes: int
    total_bytes: int
    status: Literal["downloading"] = "downloading"


class LoadResult(Struct):
    """A model on this machine. `repo_id`, `filename` and `revision` are those of Hugging Face, `bucket` and `key` S3's;
    the fields of the other source are absent."""

    status: str
    path: str
    size_bytes: int
    sha256: str | None
    commit: str | None
    source: str
    hint: str
    repo_id: str | UnsetType = UNSET
    filename: str | UnsetType = UNSET
    revision: str | UnsetType = UNSET
    bucket: str | UnsetType = UNSET
    key: str | UnsetType = UNSET


def to_reference(request: LoadRequest) -> HuggingFace | S3:
    """Return the model to download. Raises InvalidRequest that names the missing or invalid field."""
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
                "POST /reload serves a local file.",
                param="reference",
            )
        return reference
    for field in ("repo_id", "filename"):
        if not getattr(request, field):
            raise InvalidRequest(f"'{field}' is missing; it must be a string.", param=field)
    # One grammar validates all names: that of references.
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


async def load(service: Service, request: LoadRequest, progress: Progress | None = None) -> LoadResult:
    """Download a model into MODELS_DIR. `progress` is called in the download's thread.

    Cancelling stops the download unless another request waits for it. Raises what `Downloads.fetch` raises.
    """
    reference, sha256 = to_reference(request), to_sha256(request)
    fetched = await service.downloads.fetch(reference, sha256=sha256, progress=progress)
    result = LoadResult(
        status=fetched.status,
        commit=fetched.commit,
        source=fetched.source,
        path=str(fetched.path),
        size_bytes=fetched.size_bytes,
        sha256=fetched.sha256,
        hint=f'POST /reload {{"model_path": "{fetched.path}"}} to serve it.',
    )
    if isinstance(reference, HuggingFace):
        result.repo_id, result.filename, result.revision = reference.repo_id, reference.filename, reference.revision
    else:
        result.bucket, result.key = reference.bucket, reference.key
    return result
