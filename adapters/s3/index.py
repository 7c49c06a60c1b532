"""Index: what the mirror holds by its pointers (manifests and refs), and the one way in which a ref moves."""

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
    """Reads with `reader`, as a cold start does. Thread-safe."""

    def __init__(self, reader: Bucket, layout: Layout) -> None:
        self._reader, self._layout = reader, layout
        self._wrong: set[tuple[str, str | None]] = set()  # (key, ETag) of blobs whose bytes a reader found wrong

    def distrust(self, key: str, etag: str | None) -> None:
        """This version of a blob is not what its name says: it counts as missing."""
        self._wrong.add((key, etag))

    def look(self, reference: HuggingFace, commit: str, file: RemoteFile) -> Target | None:
        """What is there of a file whose sha256 is known, None if all of it is.

        The manifest is read before the blob: it is replaced only while it is still that one, so that the manifest
        written last is from an uploader that has seen the blob as it is.
        """
        sha256 = file.sha256 or ""
        blob, name = self._layout.blob(sha256), origin(reference, commit, file.path)
        place = self._layout.manifest(reference, commit, file.path)
        written = _read(self._reader.get, place)
        there = _read(self._reader.head, blob)
        etag = there.headers.get("etag") if there else None
        size = there.headers.get("content-length") if there else None
        whole = size == str(file.size_bytes) and (blob, etag) not in self._wrong
        if written is not None and whole:
            with suppress(MalformedManifest):
                manifest = Manifest.from_json(written.body)
                if (manifest.key, manifest.sha256, manifest.origin, manifest.etag) == (blob, sha256, name, etag):
                    return None
        return Target(blob, sha256, place, name, written.headers.get("etag") if written else None, etag, whole)

    def move_ref(self, client: Callable[[], S3Client], reference: HuggingFace, ref: Ref) -> None:
        """Note what a branch means, unless the hub was asked later by whoever noted it last."""
        from botocore.exceptions import ClientError

        key = self._layout.ref(reference)
        for _ in range(REF_TRIES):
            reply = _read(self._reader.get, key)
            there = Ref.from_json(reply.body) if reply is not None else None
            if there is not None and there.outlasts(ref, time.time()):
                return
            condition: Any = {"IfNoneMatch": "*"} if reply is None else {"IfMatch": reply.headers["etag"]}
            try:
                client().put_object(Bucket=self._reader.name, Key=key, Body=ref.to_json(), **condition)
            except ClientError as error:
                if not refused(error) and not missing(error):
                    raise
                continue  # another process wrote it meanwhile: compare again
            logger.info("the mirror's %s of %s is %s", reference.revision, reference.repo_id, ref.commit)
            return


def _read(read: Callable[[str], S3Response | None], key: str) -> S3Response | None:
    """None also for a 403: without s3:ListBucket that is what S3 says of a missing key."""
    try:
        return read(key)
    except Denied:
        return None
