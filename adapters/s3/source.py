"""S3 as a Source: the mirror of Hugging Face in S3_BUCKET, and any s3://bucket/key. Reads only, without boto3.

The mirror's layout: immutable bytes under their sha256, and small pointers to them.

    <prefix>/blobs/<sha256>                               the bytes of a file
    <prefix>/blobs/<sha256>.lock                         while a process uploads them (`adapters.s3.mirror.lock`)
    <prefix>/org/repo/<commit>/file.gguf.manifest.json    the file's blob and digests (`adapters.s3.manifest`)
    <prefix>/org/repo/refs/<name>                         the commit that a branch or tag meant last (`adapters.s3.ref`)
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
from adapters.transfer import memfd as memory
from adapters.transfer.checksum import Checksum, Sha256, s3_values, strongest
from adapters.transfer.transfer import BLOCK_BYTES, Transfer
from core.errors import ModelNotFound, ModelUnavailable
from core.store.model_file import ModelFile
from core.store.reference import S3, HuggingFace, is_commit, split_files
from core.store.source import Cancelled, Partial, Progress, RemoteFile, RemoteModel
from core.store.target import free_memory

PART_BYTES = 8 << 20  # enough for a request's latency not to count, small enough to share out evenly

logger = logging.getLogger("slm.s3")


@dataclass(frozen=True, slots=True)
class S3File(RemoteFile):
    """An object that was found, with its manifest if it has one."""

    bucket: Bucket | None = None
    key: str = ""
    manifest: Manifest | None = None
    checksums: Mapping[str, bytes] | None = None  # of a plain object, by algorithm


class Layout:
    """Where things lie in the mirror."""

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def blob(self, sha256: str) -> str:
        return f"{self._prefix}blobs/{sha256}"

    def manifest(self, reference: HuggingFace, commit: str, path: str) -> str:
        return f"{self._prefix}{reference.repo_id}/{commit}/{path}{SUFFIX}"

    def ref(self, reference: HuggingFace) -> str:
        return f"{self._prefix}{reference.repo_id}/refs/{reference.revision}"


class S3Storage:
    """A Source. `mirror` None: only s3:// references. `bucket` makes the Bucket of such a reference."""

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
    ) -> None:
        self.bucket = bucket
        self._mirror = mirror
        self._layout = Layout(prefix)
        self._threads = threads or default_threads()
        self._part_bytes = part_bytes or PART_BYTES
        self._lock = threading.Lock()
        self._refs: dict[tuple[str, str], str] = {}  # what the mirror's refs said: (repository, name) -> commit

    def resolve(self, reference: HuggingFace | S3, *, refresh: bool) -> RemoteModel | None:
        """What the mirror holds of a hub reference (None: not all of it), or the object that an s3:// reference names.

        Raises ModelNotFound for an s3:// reference without an object, Denied or ModelUnavailable.
        """
        if isinstance(reference, S3):
            bucket = self.bucket(reference.bucket)
            files = [self._object(bucket, key) for key in split_files(reference.key)]
            return RemoteModel(self.name, reference, tuple(files))
        if self._mirror is None:
            return None
        try:
            return self._mirrored(self._mirror, reference, refresh=refresh)
        except Denied as error:
            # Without s3:ListBucket a missing key is a 403 too: it may just not be there.
            logger.warning("the mirror is passed over: %s", error.message)
            return None

    def known_ref(self, reference: HuggingFace) -> str | None:
        """The commit that the mirror named for this branch in this process. No network."""
        with self._lock:
            return self._refs.get((reference.repo_id, reference.revision))

    def download(
        self, found: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: Cancelled
    ) -> bool:
        """Fill `partial` in parallel; what it has from an earlier try is verified first where there is a manifest."""

        def told(done: int, size: int) -> None:
            partial.landed(transfer.front())
            progress(done, size)

        assert isinstance(file, S3File)
        transfer = self._transfer(file, partial.fd, resume=partial.done)
        transfer.start()
        try:
            memory.follow(transfer, told, cancelled)
        finally:
            transfer.cancel()  # a no-op once it is complete; else nothing may write any more
            partial.landed(transfer.front())
        return False  # the blocks were verified by the manifest; the sha256 of the whole is its word only

    def open_memory(
        self, found: RemoteModel, *, name: str, progress: Progress, cancelled: Cancelled
    ) -> ModelFile | None:
        """With a manifest, returns once header and vocabulary are there and verified, the rest on its way."""
        file = found.files[0]
        if len(found.files) != 1 or not memory.is_supported():
            return None
        assert isinstance(file, S3File)
        whole = file.manifest is None  # nothing to verify the header by until the end
        return memory.receive(
            found,
            lambda fd: self._transfer(file, fd, pinned=found.reference.sha256),
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
        if pinned:  # a manifest's word for the whole is no proof
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
        )

    def _mirrored(self, bucket: Bucket, reference: HuggingFace, *, refresh: bool) -> RemoteModel | None:
        commit: str | None = reference.revision
        if not is_commit(reference.revision):
            if refresh:
                return None  # only the hub knows
            commit = self._ref(bucket, reference)
        if commit is None:
            return None
        files = []
        for path in split_files(reference.filename):
            file = self._with_manifest(bucket, self._layout.manifest(reference, commit, path), path)
            if file is None or file.manifest is None:
                return None
            if file.manifest.origin != origin(reference, commit, path):
                logger.warning("the mirror's manifest of %s is passed over: it is of %s", path, file.manifest.origin)
                return None
            files.append(file)
        return RemoteModel(self.name, reference, tuple(files), commit)

    def _ref(self, bucket: Bucket, reference: HuggingFace) -> str | None:
        reply = bucket.get(self._layout.ref(reference), most=1024)
        ref = Ref.from_json(reply.body) if reply else None
        if ref is None:
            return None
        with self._lock:
            self._refs[reference.repo_id, reference.revision] = ref.commit
        return ref.commit

    def _with_manifest(self, bucket: Bucket, key: str, path: str) -> S3File | None:
        reply = bucket.get(key)
        if reply is None:
            return None
        try:
            manifest = Manifest.from_json(reply.body)
        except MalformedManifest as error:
            logger.warning("s3://%s/%s is passed over: %s", bucket.name, key, error)
            return None
        return S3File(path, manifest.size_bytes, manifest.sha256, manifest.etag, bucket, manifest.key, manifest)

    def _object(self, bucket: Bucket, key: str) -> S3File:
        try:
            file = self._with_manifest(bucket, key + SUFFIX, key)
        except Denied:
            file = None  # perhaps only the object itself may be read; the HEAD will tell
        if file is not None:
            return file
        reply = bucket.head(key)
        if reply is None:
            raise ModelNotFound(f"There is no object s3://{bucket.name}/{key}; check bucket and key.")
        return _plain(bucket, key, reply)


def origin(reference: HuggingFace, commit: str, path: str) -> str:
    """What a manifest calls the file that it is of."""
    return f"hf://{reference.repo_id}/{path}@{commit}"


def default_threads() -> int:
    """Connections: S3 gives 80 MB/s or so to each, and more than a few per CPU only contend for it. Each holds a block
    and its TLS state: at most a sixteenth of the free memory is for them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    affordable = free_memory() // (16 * (BLOCK_BYTES + (1 << 20))) or 16
    return max(2, min(4 * cpus, 16, affordable))


def _plain(bucket: Bucket, key: str, reply: S3Response) -> S3File:
    size, etag = reply.headers.get("content-length", ""), reply.headers.get("etag", "")
    if not size.isdecimal() or not etag:
        raise ModelUnavailable(f"s3://{bucket.name}/{key} has no size or no ETag; is this an S3?", retry_after=None)
    values = s3_values(reply.headers)
    sha256 = values["sha256"].hex() if "sha256" in values else None
    return S3File(key, int(size), sha256, etag, bucket, key, None, values)
