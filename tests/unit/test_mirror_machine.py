"""The mirror's classes with an S3 in memory, under random crashes, lost answers and suspended processes."""

import contextlib
import hashlib
import io
import os
import random
import tempfile
import threading
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from botocore.exceptions import ClientError
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from adapters.s3.bucket import S3Response
from adapters.s3.manifest import Manifest
from adapters.s3.mirror.mirror import S3Mirror
from adapters.s3.ref import Ref
from adapters.s3.source import S3Storage
from core.store.reference import HuggingFace
from core.store.source import RemoteFile, RemoteModel
from tests import gguf_files

MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (32, 2), random.Random(3).randbytes(256))])
SHA256 = hashlib.sha256(MODEL).hexdigest()
REFERENCE = HuggingFace("org/repo", "tiny.gguf")
BLOB, REF = f"blobs/{SHA256}", "org/repo/refs/main"


class Crash(BaseException):
    """Ends a process."""


class MemoryS3:
    """An S3 in memory with the features that the mirror uses. Equal bytes have different ETags, as with SSE-KMS."""

    def __init__(self):
        self.lock = threading.RLock()
        self.objects = {}  # key -> (body, etag, time)
        self.uploads = {}
        self.overwritten = False  # whether the blob, which is immutable, was overwritten
        self.now = 1_000_000.0
        self.serial = 0

    def write(self, key, body, condition):
        with self.lock:
            stored = self.objects.get(key)
            if condition.get("IfNoneMatch") and stored is not None:
                raise error("PreconditionFailed")
            if (etag := condition.get("IfMatch")) is not None and (stored is None or stored[1] != etag):
                raise error("PreconditionFailed" if stored else "NoSuchKey")
            self.overwritten |= key == BLOB and stored is not None
            self.serial += 1
            self.objects[key] = (body, f'"{self.serial}"', self.now)
            return {"ETag": self.objects[key][1]}

    # `adapters.s3.bucket.Bucket`

    name = "models"

    def get(self, key, *, most=0):
        stored = self.objects.get(key)
        return (
            None
            if stored is None
            else S3Response(200, {"etag": stored[1], "content-length": str(len(stored[0]))}, stored[0])
        )

    head = get


class Client:
    """A process's boto3 client. It may crash at a request, lose an answer or pause."""

    def __init__(self, s3):
        self.s3, self.crash_in, self.lose_in = s3, None, None
        self.pause = None  # (number of requests, function that runs before the next one)

    def request(self, do):
        if self.pause is not None:
            left, meanwhile = self.pause
            self.pause = (left - 1, meanwhile) if left else None
            if not left:
                meanwhile()
        with self.s3.lock:
            if self.crash_in is not None:
                self.crash_in -= 1
                if self.crash_in < 0:
                    raise Crash
            if self.lose_in is not None:
                self.lose_in -= 1
                if self.lose_in < 0:  # botocore repeats the request
                    self.lose_in = None
                    do()
            return do()

    def put_object(self, Key, Body, Bucket=None, ContentType=None, **condition):
        return self.request(lambda: self.s3.write(Key, Body, condition))

    def get_object(self, Key, Bucket=None):
        def do():
            if Key not in self.s3.objects:
                raise error("NoSuchKey")
            body, etag, at = self.s3.objects[Key]
            headers = {"date": format_datetime(datetime.fromtimestamp(self.s3.now, UTC), usegmt=True)}
            return {
                "Body": io.BytesIO(body),
                "ETag": etag,
                "LastModified": datetime.fromtimestamp(at, UTC),
                "ResponseMetadata": {"HTTPHeaders": headers},
            }

        return self.request(do)

    def head_object(self, Key, Bucket=None):
        def do():
            if Key not in self.s3.objects:
                raise error("404")
            return {"ETag": self.s3.objects[Key][1], "ContentLength": len(self.s3.objects[Key][0])}

        return self.request(do)

    def delete_object(self, Key, IfMatch, Bucket=None):
        def do():
            stored = self.s3.objects.get(Key)
            if stored is not None and stored[1] != IfMatch:
                raise error("PreconditionFailed")
            self.s3.objects.pop(Key, None)

        self.request(do)

    def create_multipart_upload(self, Key, Bucket=None):
        def do():
            self.s3.serial += 1
            self.s3.uploads[f"u{self.s3.serial}"] = b""
            return {"UploadId": f"u{self.s3.serial}"}

        return self.request(do)

    def upload_part(self, UploadId, Body, **_):
        def do():
            if UploadId not in self.s3.uploads:
                raise error("NoSuchUpload")
            self.s3.uploads[UploadId] = Body
            return {"ETag": '"part"'}

        return self.request(do)

    def complete_multipart_upload(self, Key, UploadId, Bucket=None, MultipartUpload=None, **condition):
        def do():
            if UploadId not in self.s3.uploads:
                raise error("NoSuchUpload")
            done = self.s3.write(Key, self.s3.uploads[UploadId], condition)
            del self.s3.uploads[UploadId]
            return done

        return self.request(do)

    def abort_multipart_upload(self, UploadId, **_):
        self.request(lambda: self.s3.uploads.pop(UploadId, None))


def error(code):
    return ClientError({"Error": {"Code": code}}, "Some")


class MirrorMachine(RuleBasedStateMachine):
    """Three processes upload commits of one model to one S3."""

    def __init__(self):
        super().__init__()
        self.s3 = MemoryS3()
        self.clients, self.mirrors = {}, {}
        self.stack = contextlib.ExitStack()
        self.path = Path(self.stack.enter_context(tempfile.TemporaryDirectory()), "tiny.gguf")
        self.path.write_bytes(MODEL)
        self.latest = 0.0  # when the ref in S3 was resolved against the hub

    @initialize()
    def start_all(self):
        for index in range(3):
            self.restart(index)

    def restart(self, index):
        client = self.clients[index] = Client(self.s3)
        storage = S3Storage(lambda _: self.s3, mirror=self.s3)
        self.mirrors[index] = S3Mirror(storage, "models", "", lambda: client, background=False)

    @rule(index=st.integers(0, 2), commit=st.sampled_from("ab"), ago=st.integers(0, 100))
    def offer(self, index, commit, ago):
        file = RemoteFile("tiny.gguf", len(MODEL), SHA256)
        self.mirrors[index].offer(
            REFERENCE, RemoteModel("huggingface", REFERENCE, (file,), commit * 40, self.s3.now - ago), (self.path,)
        )

    @rule(index=st.integers(0, 2))
    def work(self, index):
        try:
            self.mirrors[index].run_pending(None)
        except Crash:
            for job in self.mirrors[index]._jobs:
                job.close()
            self.restart(index)
        self.check_ref()
        assert not self.s3.overwritten

    @rule(index=st.integers(0, 2), requests=st.integers(0, 12))
    def crash_soon(self, index, requests):
        self.clients[index].crash_in = requests

    @rule(index=st.integers(0, 2), requests=st.integers(0, 12))
    def lose_an_answer_soon(self, index, requests):
        self.clients[index].lose_in = requests

    @rule(
        index=st.integers(0, 2), requests=st.integers(0, 12), other=st.integers(0, 2), seconds=st.sampled_from([0, 700])
    )
    def suspend_soon(self, index, requests, other, seconds):
        """Suspend the process between two requests while another one works."""

        def meanwhile():
            self.s3.now += seconds
            if other != index:
                self.work(other)

        self.clients[index].pause = (requests, meanwhile)

    @rule(seconds=st.sampled_from([1, 400, 700]))
    def time_passes(self, seconds):
        self.s3.now += seconds

    @rule(key=st.sampled_from([BLOB, f"org/repo/{'a' * 40}/tiny.gguf.manifest.json"]))
    def remove(self, key):
        self.s3.objects.pop(key, None)

    def check_ref(self):
        if (reply := self.s3.get(REF)) is not None:
            ref = Ref.from_json(reply.body)
            assert ref.resolved_at >= self.latest
            self.latest = ref.resolved_at

    def teardown(self):
        """Check that one undisturbed process completes the mirror."""
        try:
            if self.mirrors:
                for index in range(3):
                    for job in self.mirrors[index]._jobs:
                        job.close()
                    self.restart(index)
                self.s3.now += 1000
                self.s3.uploads.clear()
                for commit in "ab":
                    self.offer(0, commit, 0)
                for _ in range(5):
                    if self.mirrors[0].run_pending(None):
                        break
                for commit in "ab":
                    key = f"org/repo/{commit * 40}/tiny.gguf.manifest.json"
                    manifest = Manifest.from_json(self.s3.get(key).body)
                    assert manifest.etag == self.s3.get(manifest.key).headers["etag"]
                assert self.s3.get(BLOB).body == MODEL
                assert f"{BLOB}.lock" not in self.s3.objects
        finally:
            self.stack.close()


MirrorMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("MIRROR_EXAMPLES", "60")), stateful_step_count=30, deadline=None
)
test_mirror_machine = MirrorMachine.TestCase
