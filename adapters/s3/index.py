"""Look up what the mirror holds, by its manifests and refs, and update the refs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from adapters.s3.bucket import Bucket, Denied, S3Response
from adapters.s3.manifest import MalformedManifest, Manifest
from adapters.s3.mirror.lock import missing, refused
from adapters.s3.mirror.upload import Target
from adapters.s3.ref import Ref
from adapters.s3.source import Layout, origin
from core.store.reference import HuggingFace
from core.store.source import RemoteFile

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

REF_TRIES = 3

logger = logging.getLogger("slm.mirror")


class Index:
    """The pointers of the mirror, read through `reader`. Thread-safe."""

    def __init__(self, reader: Bucket, layout: Layout) -> None:
        self._reader, self._layout = reader, layout
        self._wrong: set[tuple[str, str | None]] = set()  # (key, ETag) of blobs with wrong bytes

    def distrust(self, key: str, etag: str | None) -> None:
        """Treat this version of a blob as missing, because its bytes do not match its name."""
        self._wrong.add((key, etag))

    def look(self, reference: HuggingFace, commit: str, file: RemoteFile) -> Target | None:
        """Return the upload target of a file, or None if the mirror holds blob and manifest already.

        The manifest is read before the blob, and replaced only if it has not changed since. So the last manifest comes
        from an uploader that has seen the current blob.
        """
        sha256 = file.sha256 or ""
        blob, name = self._layout.blob(sha256), origin(reference, commit, file.path)
        place = self._layout.manifest(reference, commit, file.path)
        written = _read(self._reader.get, place)
        stored = _read(self._reader.head, blob)
        etag = stored.headers.get("etag") if stored else None
        size = stored.headers.get("content-length") if stored else None
        whole = size == str(file.size_bytes) and (blob, etag) not in self._wrong
        if written is not None and whole:
            with suppress(MalformedManifest):
                manifest = Manifest.from_json(written.body)
                if (manifest.key, manifest.sha256, manifest.origin, manifest.etag) == (blob, sha256, name, etag):
                    return None
        return Target(blob, sha256, place, name, written.headers.get("etag") if written else None, etag, whole)

    def move_ref(self, client: Callable[[], S3Client], reference: HuggingFace, ref: Ref) -> None:
        """Record the commit of a branch, unless the recorded one was resolved later."""
        from botocore.exceptions import ClientError

        key = self._layout.ref(reference)
        for _ in range(REF_TRIES):
            response = _read(self._reader.get, key)
            recorded = Ref.from_json(response.body) if response is not None else None
            if recorded is not None and recorded.outlasts(ref, time.time()):
                return
            condition: Any = {"IfNoneMatch": "*"} if response is None else {"IfMatch": response.headers["etag"]}
            try:
                client().put_object(Bucket=self._reader.name, Key=key, Body=ref.to_json(), **condition)
            except ClientError as error:
                if not refused(error) and not missing(error):
                    raise
                continue  # another process has changed it: compare again
            logger.info("the mirror's %s of %s is %s", reference.revision, reference.repo_id, ref.commit)
            return


def _read(read: Callable[[str], S3Response | None], key: str) -> S3Response | None:
    """Return None also for a 403: without s3:ListBucket S3 answers so for a missing key."""
    try:
        return read(key)
    except Denied:
        return None
