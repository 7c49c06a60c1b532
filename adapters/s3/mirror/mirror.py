"""S3Mirror: uploads to the bucket, once, what the hub delivered. Implements `core.store.source.Mirror`.

A server uploads in a thread of its own. On Lambda nothing runs between invocations, so the runtime's loop calls
`run_pending` after an answer's last byte, before it asks for the next event; what is not finished then goes on after
the next one. `adapters.s3.mirror.lock` sees to it that of fifty cold starts one uploads.
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

TRIES = 3  # of a model, after failures that may pass
RETRY_S = 30.0  # until a lock that another holds is looked at again
START_S = 8.0  # time before a deadline under which nothing is begun: importing boto3 alone takes a second

logger = logging.getLogger("slm.mirror")


@dataclass(slots=True, eq=False)
class _Job:
    """One model to be mirrored; `files` are those still to do, each with its open descriptor."""

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
    """`storage` reads the same bucket; `client` makes boto3's client, when there is something to upload.

    `background`: a thread of its own does the work; else `run_pending` does.
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
        self._lock = threading.Lock()  # held by whoever works
        self._jobs: list[_Job] = []
        self._wake = threading.Condition()  # guards _jobs and _thread
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def offer(self, reference: HuggingFace, found: RemoteModel, paths: tuple[Path, ...]) -> None:
        """Upload once, later, and note what the branch in `reference` means. Returns at once, raises nothing."""
        job = self._job(reference, found, paths)
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

    def distrust(self, found: RemoteModel) -> None:
        """An offer of the same model replaces these objects, if they are still the ones that were read."""
        for file in found.files:
            if isinstance(file, S3File):
                self._index.distrust(file.key, file.etag)

    def run_pending(self, deadline: float | None) -> bool:
        """Work on what was offered until `deadline` (monotonic). True: nothing is left to do. Raises nothing."""
        with self._wake:
            jobs = list(self._jobs)
        if not jobs:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread is at it
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
        found: RemoteModel,
        paths: tuple[Path, ...],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Like `offer`, but now, to the end. Raises ModelUnavailable if it does not succeed."""
        job = self._job(reference, found, paths)
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
        """End the thread and what it uploads; another process may go on at once."""
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

    def _job(self, reference: HuggingFace, found: RemoteModel, paths: tuple[Path, ...]) -> _Job | None:
        """None: there is nothing to do. The files are opened now, so that they cannot be replaced meanwhile."""
        if found.commit is None or not is_commit(found.commit):
            return None
        mirrored = found.source == self._storage.name
        if mirrored and (is_commit(reference.revision) or self._storage.known_ref(reference) == found.commit):
            return None
        job = _Job(reference, found.commit, found.resolved_at or time.time(), [])
        try:
            for file, path in zip(found.files, paths, strict=True) if not mirrored else ():
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
        """One sitting. True: the job is over, done or given up. Raises nothing: it runs between two answers."""
        try:
            return self._sit(job, deadline)
        except LockLost:
            logger.info("%s: another process uploads it now", job.reference)
            self._drop_upload(job)
            job.not_before = self._clock() + self._retry_s
            return False
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the server
            return self._give_up(job, error)

    def _give_up(self, job: _Job, error: Exception) -> bool:
        """False: not yet, the failure may pass."""
        from botocore.exceptions import BotoCoreError, ClientError

        passing = False
        if isinstance(error, ModelUnavailable):
            job.failure = error.message
        elif isinstance(error, UploadFailed):
            job.failure = str(error)
        else:
            job.failure = f"{type(error).__name__}: {error}"
            known = isinstance(error, (ClientError, BotoCoreError, OSError))
            if not known:
                logger.error("mirroring %s failed", job.reference, exc_info=error)
            passing = known and not (isinstance(error, ClientError) and code(error) == "AccessDenied")
        self._drop_upload(job)
        job.tries += 1
        if passing and job.tries < TRIES:
            logger.warning("mirroring %s failed and is tried again: %s", job.reference, job.failure)
            job.failure, job.not_before = None, self._clock() + self._retry_s
            return False
        logger.warning("%s is not mirrored: %s", job.reference, job.failure)
        return True

    def _sit(self, job: _Job, deadline: float | None) -> bool:
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
        """Have an upload for the first file of `job`, unless it is there already. False: not now."""
        if deadline is not None and deadline - self._clock() < self._start_s:
            return False
        file, descriptor = job.files[0]
        if file.sha256 is None:  # the hub's word for a file that is not in LFS is another
            file = replace(file, sha256=sha256_of(descriptor, self._closed.is_set))
        target = self._index.look(job.reference, job.commit, file)
        if target is None:
            return True
        client = self._boto()
        lock = UploadLock(client, self._bucket, target.blob + ".lock", ttl=self._lock_ttl_s)
        left = lock.acquire()
        if left is None:
            job.not_before = self._clock() + self._retry_s
            return False
        target = self._index.look(job.reference, job.commit, file)  # the last holder may have finished meanwhile
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
        job.upload.begin(left)
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
    """boto3's S3 client, a second or so in the making. MinIO and its kind want path-style addresses."""
    import boto3
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=8,
        request_checksum_calculation="when_required",  # older MinIOs know no trailing checksums; ours is the sha256
    )
    return boto3.client("s3", endpoint_url=endpoint_url, config=config)
