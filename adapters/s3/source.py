"""Read models from S3: the mirror of Hugging Face in S3_BUCKET, and any s3://bucket/key. Without boto3.

The mirror stores immutable bytes under their sha256, and small pointers to them:

    <prefix>/blobs/<sha256>                               the bytes of a file
    <prefix>/blobs/<sha256>.lock                          held by its uploader (`adapters.s3.mirror.lock`)
    <prefix>/org/repo/<commit>/file.gguf.manifest.json    the file's blob and digests (`adapters.s3.manifest`)
    <prefix>/org/repo/refs/<name>                         the last known commit of a branch or tag (`adapters.s3.ref`)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapters.s3.bucket import Bucket, Denied, S3Response
from adapters.s3.manifest import SUFFIX, MalformedManifest, Manifest
from adapters.s3.ref import Ref
from adapters.transfer import memfd
from adapters.transfer.checksum import Checksum, Sha256, s3_values, strongest
from adapters.transfer.retry import DEFAULT_POLICY, RetryPolicy
from adapters.transfer.transfer import BLOCK_BYTES, PART_BYTES, Transfer
from core.errors import ModelNotFound, ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace, is_commit, split_files
from core.store.source import Cancelled, Partial, Progress, RemoteFile, RemoteModel, never
from core.store.target import free_memory

logger = logging.getLogger("slm.s3")


@dataclass(frozen=True, slots=True)
class S3File(RemoteFile):
    """An object, with its manifest if it has one."""

    bucket: Bucket | None = None
    key: str = ""
    manifest: Manifest | None = None
    checksums: Mapping[str, bytes] | None = None  # of an object without a manifest, by algorithm


class Layout:
    """The keys of the mirror."""

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def blob(self, sha256: str) -> str:
        return f"{self._prefix}blobs/{sha256}"

    def manifest(self, reference: HuggingFace, commit: str, path: str) -> str:
        return f"{self._prefix}{reference.repo_id}/{commit}/{path}{SUFFIX}"

    def ref(self, reference: HuggingFace) -> str:
        return f"{self._prefix}{reference.repo_id}/refs/{reference.revision}"


class S3Storage:
    """A Source. Without `mirror` it serves s3:// references only. `bucket` makes the Bucket of such a reference."""

    name = "s3"
    authority = False

    def __init__(
        self,
        bucket: Callable[[str], Bucket],
        *,
        mirror: Bucket | None = None,
        prefix: str = "",
        threads: int = 0,
        part_bytes: int = 0,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        self.bucket = bucket
        self._policy = policy
        self._mirror = mirror
        self._layout = Layout(prefix)
        self._threads = threads or default_threads()
        self._part_bytes = part_bytes or PART_BYTES
        self._lock = threading.Lock()
        self._refs: dict[tuple[str, str], str] = {}  # of the mirror: (repository, name) -> commit

    def resolve(
        self, reference: HuggingFace | S3, *, refresh: bool, cancelled: Cancelled = never
    ) -> RemoteModel | None:
        """Return the object of an s3:// reference, or the mirror's copy of a Hugging Face reference if it is complete.

        Raise ModelNotFound for an s3:// reference without an object, Denied, ModelUnavailable or DownloadCancelled.
        """
        if isinstance(reference, S3):
            bucket = self.bucket(reference.bucket)
            files = [self._object(bucket, key, cancelled) for key in split_files(reference.key)]
            return RemoteModel(self.name, reference, tuple(files))
        if self._mirror is None:
            return None
        try:
            return self._mirrored(self._mirror, reference, refresh=refresh, cancelled=cancelled)
        except Denied as error:
            # Without s3:ListBucket a missing key is a 403 too, so the model may just not be mirrored.
            logger.warning("the mirror is skipped: %s", error.message)
            return None

    def known_ref(self, reference: HuggingFace) -> str | None:
        """Return the commit that the mirror named for this branch, if this process has read it. No network."""
        with self._lock:
            return self._refs.get((reference.repo_id, reference.revision))

    def download(
        self, remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """Fill `partial` in parallel. With a manifest, bytes of an earlier try are verified first."""

        def report(done: int, size: int) -> None:
            partial.landed(transfer.front())
            progress(done, size)

        assert isinstance(file, S3File)
        transfer = self._transfer(file, partial.fd, resume=partial.done)
        transfer.start()
        try:
            memfd.follow(transfer, report, cancelled)
        finally:
            transfer.cancel()  # no effect once complete; otherwise waits until no thread writes
            partial.landed(transfer.front())
        return False  # the manifest's digests verify blocks; its sha256 of the whole is a claim

    def open_memory(
        self, remote: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """With a manifest, return once header and vocabulary are verified. The rest is downloaded in the background."""
        file = remote.files[0]
        assert isinstance(file, S3File)
        whole = file.manifest is None  # without block digests only the whole can be verified
        return memfd.receive(
            remote,
            lambda fd: self._transfer(file, fd, pinned=remote.reference.sha256),
            name,
            progress,
            cancelled,
            whole=whole,
        )

    def _transfer(self, file: S3File, fd: int, *, resume: int = 0, pinned: tuple[str, ...] = ()) -> Transfer:
        assert file.bucket is not None
        assert file.etag is not None
        manifest = file.manifest
        checksum: Checksum | None = None
        if pinned:  # the manifest only claims a sha256 of the whole
            checksum = Sha256(pinned[0])
        elif manifest is None:
            checksum = strongest(file.checksums or {})
        return Transfer(
            file.bucket.origin(file.key, file.etag),
            fd,
            file.size_bytes,
            block_bytes=manifest.block_bytes if manifest else BLOCK_BYTES,
            digests=manifest.digests() if manifest else None,
            checksum=checksum,
            first_bytes=manifest.header_bytes if manifest else 0,
            resume=resume,
            threads=self._threads,
            part_bytes=self._part_bytes,
            policy=self._policy,
        )

    def _mirrored(
        self, bucket: Bucket, reference: HuggingFace, *, refresh: bool, cancelled: Cancelled
    ) -> RemoteModel | None:
        commit: str | None = reference.revision
        if not is_commit(reference.revision):
            if refresh:
                return None  # only Hugging Face knows the current commit
            commit = self._ref(bucket, reference, cancelled)
        if commit is None:
            return None
        files = []
        for path in split_files(reference.filename):
            file = self._with_manifest(bucket, self._layout.manifest(reference, commit, path), path, cancelled)
            if file is None or file.manifest is None:
                return None
            if file.manifest.origin != origin(reference, commit, path):
                logger.warning("the mirror's manifest of %s is skipped: it belongs to %s", path, file.manifest.origin)
                return None
            files.append(file)
        return RemoteModel(self.name, reference, tuple(files), commit)

    def _ref(self, bucket: Bucket, reference: HuggingFace, cancelled: Cancelled) -> str | None:
        response = bucket.get(self._layout.ref(reference), most=1024, cancelled=cancelled)
        ref = Ref.from_json(response.body) if response else None
        if ref is None:
            return None
        with self._lock:
            self._refs[reference.repo_id, reference.revision] = ref.commit
        return ref.commit

    def _with_manifest(self, bucket: Bucket, key: str, path: str, cancelled: Cancelled) -> S3File | None:
        response = bucket.get(key, cancelled=cancelled)
        if response is None:
            return None
        try:
            manifest = Manifest.from_json(response.body)
        except MalformedManifest as error:
            logger.warning("s3://%s/%s is skipped: %s", bucket.name, key, error)
            return None
        return S3File(path, manifest.size_bytes, manifest.sha256, manifest.etag, bucket, manifest.key, manifest)

    def _object(self, bucket: Bucket, key: str, cancelled: Cancelled) -> S3File:
        try:
            file = self._with_manifest(bucket, key + SUFFIX, key, cancelled)
        except Denied:
            file = None  # the object itself may still be readable
        if file is not None:
            return file
        response = bucket.head(key, cancelled=cancelled)
        if response is None:
            raise ModelNotFound(f"There is no object s3://{bucket.name}/{key}; check bucket and key.")
        return _plain(bucket, key, response)


def origin(reference: HuggingFace, commit: str, path: str) -> str:
    """Return the name of a file in its manifest."""
    return f"hf://{reference.repo_id}/{path}@{commit}"


def default_threads() -> int:
    """Return the number of connections.

    S3 delivers about 80 MB/s on each, and more than a few per CPU only contend for it. Each holds a block and its TLS
    state; together they take at most a sixteenth of the free memory.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    affordable = free_memory() // (16 * (BLOCK_BYTES + (1 << 20))) or 16
    return max(2, min(4 * cpus, 16, affordable))


def _plain(bucket: Bucket, key: str, response: S3Response) -> S3File:
    size, etag = response.headers.get("content-length", ""), response.headers.get("etag", "")
    if not size.isdecimal() or not etag:
        raise ModelUnavailable(
            f"s3://{bucket.name}/{key} has no size or no ETag. Check S3_ENDPOINT_URL.",
            retry_after=None,
        )
    values = s3_values(response.headers)
    sha256 = values["sha256"].hex() if "sha256" in values else None
    return S3File(key, int(size), sha256, etag, bucket, key, None, values)
