"""Upload models from Hugging Face to the bucket, once. Implements `core.store.source.Mirror`.

A server uploads in a background thread. On Lambda nothing runs between invocations: the runtime loop calls
`run_pending` after a response's last byte, before it requests the next event, and an unfinished upload continues after
the next one. `adapters.s3.mirror.lock` ensures that of fifty cold starts only one uploads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.s3.index import Index
from adapters.s3.mirror.lock import TTL_S, LockLost, UploadLock, code
from adapters.s3.mirror.upload import Upload, UploadFailed
from adapters.s3.ref import Ref
from adapters.s3.source import Layout, S3File, S3Storage
from core.errors import ModelUnavailable
from core.store.partial import sha256_of
from core.store.reference import HuggingFace, is_commit
from core.store.source import RemoteFile, RemoteModel

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

TRIES = 3  # per model, after transient failures
RETRY_S = 30.0  # until a lock held by another process is tried again
START_S = 8.0  # least time before a deadline to begin anything: importing boto3 alone takes a second

logger = logging.getLogger("slm.mirror")


@dataclass(slots=True, eq=False)
class _Job:
    """One model to upload. `files` are the remaining ones, each with its open descriptor."""

    reference: HuggingFace
    commit: str
    resolved_at: float
    files: list[tuple[RemoteFile, int]]
    progress: Callable[[int, int], None] | None = None
    upload: Upload | None = None
    tries: int = 0
    not_before: float = 0.0
    failure: str | None = None

    def close(self) -> None:
        if self.upload is not None:
            self.upload.close()
        for _, descriptor in self.files:
            os.close(descriptor)
        self.files = []


class S3Mirror:
    """`storage` reads the same bucket. `client` makes boto3's client once there is something to upload.

    With `background` a thread does the work, otherwise `run_pending` does.
    """

    def __init__(
        self,
        storage: S3Storage,
        bucket: str,
        prefix: str,
        client: Callable[[], S3Client],
        *,
        background: bool,
        lock_ttl_s: float = TTL_S,
        retry_s: float = RETRY_S,
        start_s: float = START_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._bucket = storage, bucket
        self._index = Index(storage.bucket(bucket), Layout(prefix))
        self._make_client = client
        self._client: S3Client | None = None
        self._background, self._lock_ttl_s = background, lock_ttl_s
        self._retry_s, self._start_s, self._clock = retry_s, start_s, clock
        self._lock = threading.Lock()  # held by the thread that uploads
        self._jobs: list[_Job] = []
        self._wake = threading.Condition()  # guards _jobs and _thread
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def offer(self, reference: HuggingFace, remote: RemoteModel, paths: tuple[Path, ...]) -> None:
        """Upload the model later, once, and record the commit of its branch. Return at once, never raise."""
        job = self._job(reference, remote, paths)
        if job is None:
            return
        with self._wake:
            if self._closed.is_set() or any(
                each.reference == reference and each.commit == job.commit for each in self._jobs
            ):
                job.close()
                return
            self._jobs.append(job)
            if self._background and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def distrust(self, remote: RemoteModel) -> None:
        """Let the next offer of the same model replace these objects, unless they have changed since."""
        for file in remote.files:
            if isinstance(file, S3File):
                self._index.distrust(file.key, file.etag)

    def run_pending(self, deadline: float | None) -> bool:
        """Upload what was offered until `deadline` (monotonic clock). Return True if nothing is left. Never raise."""
        with self._wake:
            jobs = list(self._jobs)
        if not jobs:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread is uploading
        try:
            for job in jobs:
                if job.not_before <= self._clock() and self._work(job, deadline):
                    job.close()
                    with self._wake:
                        self._jobs.remove(job)
        finally:
            self._lock.release()
        with self._wake:
            return not self._jobs

    def upload(
        self,
        reference: HuggingFace,
        remote: RemoteModel,
        paths: tuple[Path, ...],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Upload now and wait for the end. Raise ModelUnavailable if it fails."""
        job = self._job(reference, remote, paths)
        if job is None:
            return
        job.progress = progress
        try:
            with self._lock:
                while not self._work(job, None):
                    time.sleep(max(0.1, min(5.0, job.not_before - self._clock())))
            if job.failure is not None:
                raise ModelUnavailable(f"{reference} was not uploaded: {job.failure}", retry_after=None)
        finally:
            job.close()

    def close(self) -> None:
        """Stop the thread and its upload, and release the lock, so that another process can continue at once."""
        with self._wake:
            self._closed.set()
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        if thread is not None:
            thread.join()
        with self._wake:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            if job.upload is not None:
                job.upload.abandon()
            job.close()

    def _job(self, reference: HuggingFace, remote: RemoteModel, paths: tuple[Path, ...]) -> _Job | None:
        """Return a job, or None if there is nothing to do. Files are opened now, so they cannot be swapped later."""
        if remote.commit is None or not is_commit(remote.commit):
            return None
        mirrored = remote.source == self._storage.name
        if mirrored and (is_commit(reference.revision) or self._storage.known_ref(reference) == remote.commit):
            return None
        job = _Job(reference, remote.commit, remote.resolved_at or time.time(), [])
        try:
            for file, path in zip(remote.files, paths, strict=True) if not mirrored else ():
                job.files.append((file, os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
        except OSError as error:
            logger.warning("%s is not mirrored: %s", reference, error)
            job.close()
            return None
        return job

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                if self.run_pending(None):
                    with self._wake:
                        if not self._jobs:
                            self._thread = None
                            return
                self._closed.wait(1.0)
        finally:
            with self._wake:
                if self._thread is threading.current_thread():  # the next offer starts another
                    self._thread = None

    def _work(self, job: _Job, deadline: float | None) -> bool:
        """Continue a job. Return True once it is done or given up. Never raise: this runs between two responses."""
        try:
            return self._advance(job, deadline)
        except LockLost:
            logger.info("%s: another process is uploading it", job.reference)
            self._drop_upload(job)
            job.not_before = self._clock() + self._retry_s
            return False
        except Exception as error:  # noqa: BLE001 - no failure may end the server
            return self._give_up(job, error)

    def _give_up(self, job: _Job, error: Exception) -> bool:
        """Return False if the failure is transient and the job is tried again, True if it is over."""
        from botocore.exceptions import BotoCoreError, ClientError

        transient = False
        if isinstance(error, ModelUnavailable):
            job.failure = error.message
        elif isinstance(error, UploadFailed):
            job.failure = str(error)
        else:
            job.failure = f"{type(error).__name__}: {error}"
            expected = isinstance(error, (ClientError, BotoCoreError, OSError))
            if not expected:
                logger.error("mirroring %s failed", job.reference, exc_info=error)
            transient = expected and not (isinstance(error, ClientError) and code(error) == "AccessDenied")
        self._drop_upload(job)
        job.tries += 1
        if transient and job.tries < TRIES:
            logger.warning("mirroring %s failed and will be retried: %s", job.reference, job.failure)
            job.failure, job.not_before = None, self._clock() + self._retry_s
            return False
        logger.warning("%s is not mirrored: %s", job.reference, job.failure)
        return True

    def _advance(self, job: _Job, deadline: float | None) -> bool:
        """Upload the remaining files, then move the ref. Return False at the deadline."""
        while job.files:
            if job.upload is None and not self._begin(job, deadline):
                return False
            if job.upload is not None and not job.upload.advance(deadline):
                return False
            job.upload = None
            file, descriptor = job.files.pop(0)
            os.close(descriptor)
            logger.info("mirrored %s of %s", file.path, job.reference)
        return self._note_ref(job, deadline)

    def _begin(self, job: _Job, deadline: float | None) -> bool:
        """Start the upload of the job's first file, unless the mirror has it. Return False if it must wait."""
        if deadline is not None and deadline - self._clock() < self._start_s:
            return False
        file, descriptor = job.files[0]
        if file.sha256 is None:  # Hugging Face names no sha256 for files that are not in LFS
            file = replace(file, sha256=sha256_of(descriptor, self._closed.is_set))
        target = self._index.look(job.reference, job.commit, file)
        if target is None:
            return True
        client = self._boto()
        lock = UploadLock(client, self._bucket, target.blob + ".lock", ttl=self._lock_ttl_s)
        unfinished = lock.acquire()
        if unfinished is None:
            job.not_before = self._clock() + self._retry_s
            return False
        target = self._index.look(job.reference, job.commit, file)  # the last holder may have finished it
        if target is None:
            lock.release()
            return True
        job.upload = Upload(
            client,
            self._bucket,
            target,
            descriptor,
            lock=lock,
            progress=job.progress,
            stopped=self._closed.is_set,
            clock=self._clock,
        )
        job.upload.begin(unfinished)
        return True

    def _note_ref(self, job: _Job, deadline: float | None) -> bool:
        if is_commit(job.reference.revision):
            return True
        if deadline is not None and deadline - self._clock() < self._start_s:
            return False
        self._index.move_ref(self._boto, job.reference, Ref(job.commit, job.resolved_at))
        return True

    def _drop_upload(self, job: _Job) -> None:
        if job.upload is not None:
            job.upload.abandon()
            job.upload = None

    def _boto(self) -> S3Client:
        if self._client is None:
            self._client = self._make_client()
        return self._client


def boto3_client(endpoint_url: str | None) -> S3Client:
    """Return boto3's S3 client, which takes about a second. MinIO and similar servers need path-style addresses."""
    import boto3
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=8,
        request_checksum_calculation="when_required",  # older MinIOs do not support trailing checksums
    )
    return boto3.client("s3", endpoint_url=endpoint_url, config=config)
