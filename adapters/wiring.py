"""Build the Service from settings. Every entry point calls `build`, the only place that does."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters.huggingface.source import Hub
from core.downloads import Downloads
from core.host import Host
from core.loader import load_embedder, load_llama
from core.response_store import ResponseStore
from core.selection import select_embedding
from core.service import Service
from core.settings import Settings
from core.store.embedded import embedded_model
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace
from core.store.source import Cancelled, Mirror, Partial, Progress, RemoteFile, RemoteModel, Source, never
from core.store.store import Store
from core.timeline import Timeline

if TYPE_CHECKING:
    from adapters.s3.source import S3Storage


logger = logging.getLogger("slm.wiring")


def build(settings: Settings, timeline: Timeline | None = None, *, on_lambda: bool = False) -> Service:
    """Return a Service. This uses neither network nor model; `service.host.start()` does.

    On Lambda nothing runs between invocations, so mirroring waits for `service.store.idle`. Models are downloaded into
    memory if they fit: /tmp is small, SnapStart forbids a larger one, and memory is not written back.
    """
    timeline = timeline or Timeline()
    in_order = sources(settings)
    uploads = mirror(settings, in_order, background=not on_lambda)

    def new_store(allowed: tuple[Path, ...], *, generates: bool) -> Store:
        return Store(
            settings.models_dir,
            sources=in_order,
            mirror=uploads,
            allowed=allowed,
            target=settings.model_target,
            prefer_memory=on_lambda,
            generates=generates,
        )

    store = new_store(_allowed(settings), generates=True)
    host = Host(settings, store, timeline, load_llama)
    responses = ResponseStore(settings.responses_store)
    service = Service(settings, store, host, timeline, Downloads(store), responses=responses)
    if settings.embedding_model_path is None:
        return service
    embedding_store = new_store(_local(settings.embedding_model_path), generates=False)
    # The phases of its load are not those of the start.
    embedder = Host(settings, embedding_store, Timeline(), load_embedder, select_embedding)
    return dataclasses.replace(service, embedder=embedder)


def sources(settings: Settings) -> tuple[Source, ...]:
    """Return the sources in the order in which they are asked: S3 first if it is configured, then Hugging Face.

    Otherwise S3 is imported with the first s3:// reference: its import takes 30 ms, mostly for http.client.
    """
    if settings.hf_token and _is_open(settings.hf_endpoint):
        logger.warning("HF_ENDPOINT=%s is not https: HF_TOKEN is sent unencrypted", settings.hf_endpoint)
    hub = Hub(
        settings.hf_endpoint,
        settings.hf_token,
        threads=settings.download_threads,
        part_bytes=settings.download_part_mb << 20,
    )
    s3_first = settings.s3_bucket is not None or (settings.model_path or "").startswith("s3://")
    return (s3(settings), hub) if s3_first else (hub, _LateS3(settings))


def _is_open(url: str) -> bool:
    """Return whether requests to `url` cross a network unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def mirror(settings: Settings, in_order: tuple[Source, ...], *, background: bool) -> Mirror | None:
    """Return the mirror that uploads models from Hugging Face to S3_BUCKET, if S3_MIRROR=write."""
    if settings.s3_bucket is None or settings.s3_mirror != "write":
        return None
    from adapters.s3.mirror.mirror import S3Mirror, boto3_client
    from adapters.s3.source import S3Storage

    storage = next(source for source in in_order if isinstance(source, S3Storage))
    return S3Mirror(
        storage,
        settings.s3_bucket,
        settings.s3_prefix,
        functools.partial(boto3_client, settings.s3_endpoint_url),
        background=background,
    )


def s3(settings: Settings) -> S3Storage:
    """Return the source of s3:// references, and of the mirror in S3_BUCKET unless S3_MIRROR=off."""
    from adapters.aws.credentials import CredentialChain
    from adapters.s3.bucket import Bucket
    from adapters.s3.source import S3Storage

    chain = CredentialChain()

    def bucket(name: str) -> Bucket:
        return Bucket(name, credentials=chain, endpoint_url=settings.s3_endpoint_url)

    mirrored = settings.s3_bucket is not None and settings.s3_mirror != "off"
    return S3Storage(
        bucket,
        mirror=bucket(settings.s3_bucket) if mirrored and settings.s3_bucket else None,
        prefix=settings.s3_prefix,
        threads=settings.download_threads,
        part_bytes=settings.download_part_mb << 20,
    )


class _LateS3:
    """The S3 source without a mirror. It is imported with the first s3:// reference."""

    name = "s3"
    authority = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @functools.cached_property
    def _source(self) -> S3Storage:
        return s3(self._settings)

    def resolve(
        self, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled = never
    ) -> RemoteModel | None:
        if not isinstance(reference, S3):
            return None
        return self._source.resolve(reference, refresh=refresh, cancelled=cancelled)

    def download(
        self, remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        return self._source.download(remote, file, partial, progress=progress, cancelled=cancelled)

    def open_memory(
        self, remote: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        return self._source.open_memory(remote, name=name, progress=progress, cancelled=cancelled)


def _allowed(settings: Settings) -> tuple[Path, ...]:
    """Return the files outside MODELS_DIR that may be served: the configured and the embedded model."""
    paths = _local(settings.model_path)
    embedded = embedded_model() if settings.embedded_model == "auto" else None
    return paths if embedded is None else (*paths, embedded)


def _local(configured: str | None) -> tuple[Path, ...]:
    """Return the path of a configured model if it is a local file."""
    return () if configured is None or "://" in configured else (Path(configured).expanduser(),)
