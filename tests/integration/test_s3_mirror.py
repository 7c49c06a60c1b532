"""The mirror with moto's S3: uploads, locks, refs and what a cold start reads."""

import base64
import dataclasses
import datetime
import email.utils
import hashlib
import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from adapters.s3.manifest import Manifest
from adapters.s3.mirror.lock import LockLost, UploadLock
from adapters.s3.mirror.mirror import S3Mirror
from adapters.s3.ref import Ref
from adapters.s3.source import S3Storage
from core.errors import ModelUnavailable
from core.store import gguf
from core.store.reference import HuggingFace
from core.store.source import RemoteFile, RemoteModel
from tests import gguf_files
from tests.integration.fault_proxy import FaultProxy, Status
from tests.integration.s3_double import BUCKET, bucket, clean_environ, moto_server, s3_client

COMMIT, OLD_COMMIT = "c" * 40, "0" * 40
TENSOR = random.Random(5).randbytes(4 * 1024 * 5000)  # 20 MB: three parts of an upload, ten blocks
MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (1024, 5000), TENSOR)])
SHA256 = hashlib.sha256(MODEL).hexdigest()
REFERENCE = HuggingFace("org/repo", "folder/tiny.gguf")
REMOTE = RemoteModel("huggingface", REFERENCE, (RemoteFile(REFERENCE.filename, len(MODEL), SHA256),), COMMIT)
KEY = f"models/blobs/{SHA256}"
MANIFEST = f"models/org/repo/{COMMIT}/folder/tiny.gguf.manifest.json"
REF = "models/org/repo/refs/main"


@pytest.fixture(scope="module")
def port():
    with moto_server() as port:
        yield port


@pytest.fixture
def client(port):
    """An S3 client on an empty bucket."""
    client = s3_client(port)
    yield client
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=each["Key"])
    for each in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        client.abort_multipart_upload(Bucket=BUCKET, Key=each["Key"], UploadId=each["UploadId"])
    client.close()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(MODEL)
    return path


class Bench:
    """A storage and a mirror on one bucket."""

    def __init__(self, port, client, **options):
        self.reader = bucket(port)
        self.storage = S3Storage(bucket=lambda name: bucket(port, name), mirror=self.reader, prefix="models")
        options = {"background": False, **options}
        self.mirror = S3Mirror(self.storage, BUCKET, "models", lambda: client, **options)

    def close(self):
        self.mirror.close()
        self.reader.close()


@pytest.fixture
def bench(port, client):
    bench = Bench(port, client)
    yield bench
    bench.close()


def keys(client):
    return sorted(each["Key"] for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []))


def manifest(client):
    return Manifest.from_json(client.get_object(Bucket=BUCKET, Key=MANIFEST)["Body"].read())


def ref(client):
    return Ref.from_json(client.get_object(Bucket=BUCKET, Key=REF)["Body"].read())


def pass_time(client, seconds):
    """Move S3's clock, as this client sees it, forward by this many seconds."""

    def shift(parsed, **_):
        headers = parsed["ResponseMetadata"]["HTTPHeaders"]
        date = email.utils.parsedate_to_datetime(headers["date"]) + datetime.timedelta(seconds=seconds)
        headers["date"] = email.utils.format_datetime(date, usegmt=True)

    client.meta.events.register("after-call.s3.GetObject", shift)


def soon(deadline=20.0):
    return time.monotonic() + deadline


def test_a_model_is_uploaded_with_manifest_and_ref(bench, client, path):
    """No lock and no unfinished upload remain."""
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert bench.mirror.run_pending(None)

    assert keys(client) == sorted([KEY, MANIFEST, REF])
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    written = manifest(client)
    assert (written.key, written.sha256) == (KEY, SHA256)
    assert written.header_bytes == gguf.read_header(path).data_offset
    assert written.blocks[1] == hashlib.sha256(MODEL[2 << 20 : 4 << 20]).hexdigest()
    assert written.origin == f"hf://org/repo/folder/tiny.gguf@{COMMIT}"
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_a_model_is_uploaded_once(bench, client, path):
    """A second offer of the same commit writes only the ref."""
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    bench.mirror.run_pending(None)
    written = []
    client.meta.events.register("before-call.s3", lambda model, **_: written.append(model.name))
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert bench.mirror.run_pending(None)

    assert written == ["PutObject"]  # of the ref, which has a newer time


def test_a_model_is_resolved_by_ref_or_commit(bench, client, path):
    """A cold start uses the ref; a refresh resolves commits only. Unknown branches and files are not found."""
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    bench.mirror.run_pending(None)

    remote = bench.storage.resolve(REFERENCE, refresh=False)
    assert (remote.commit, remote.files[0].sha256, remote.size_bytes) == (COMMIT, SHA256, len(MODEL))
    assert bench.storage.resolve(REFERENCE, refresh=True) is None
    pinned = HuggingFace("org/repo", REFERENCE.filename, COMMIT)
    assert bench.storage.resolve(pinned, refresh=True).commit == COMMIT
    assert bench.storage.resolve(HuggingFace("org/repo", REFERENCE.filename, "v2"), refresh=False) is None
    assert bench.storage.resolve(HuggingFace("org/repo", "other.gguf"), refresh=False) is None


def test_the_ref_follows_the_branch(bench, client, path):
    """If the hub resolves a branch to another commit, the ref is updated, whatever the source of the file."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(OLD_COMMIT, 1.0).to_json())
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    mirrored = RemoteModel("s3", REFERENCE, REMOTE.files, COMMIT)
    bench.mirror.offer(REFERENCE, mirrored, (path,))
    bench.mirror.run_pending(None)

    assert ref(client).commit == COMMIT
    assert keys(client) == [REF]


def test_a_cold_start_from_the_mirror_writes_nothing(bench, client, path):
    """A model that was resolved by the mirror's own ref is not checked again."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    bench.storage.resolve(REFERENCE, refresh=False)
    bench.mirror.offer(REFERENCE, RemoteModel("s3", REFERENCE, REMOTE.files, COMMIT), (path,))

    assert bench.mirror.run_pending(0.0)


def test_a_split_model_needs_all_its_parts(bench, client, tmp_path):
    """Each file is uploaded. The model is found only if all of them are there."""
    names = [f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    paths = []
    for name in names:
        paths.append(tmp_path / name)
        paths[-1].write_bytes(MODEL)
    reference = HuggingFace("org/repo", names[0])
    files = tuple(RemoteFile(name, len(MODEL), SHA256) for name in names)
    bench.mirror.offer(reference, RemoteModel("huggingface", reference, files, COMMIT), tuple(paths))
    assert bench.mirror.run_pending(None)

    assert [file.path for file in bench.storage.resolve(reference, refresh=False).files] == names
    client.delete_object(Bucket=BUCKET, Key=f"models/org/repo/{COMMIT}/{names[1]}.manifest.json")
    assert bench.storage.resolve(reference, refresh=False) is None


def test_a_server_uploads_in_the_background(port, client, path):
    """The upload runs in its own thread."""
    bench = Bench(port, client, background=True)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    end = soon(30)
    while REF not in keys(client) and time.monotonic() < end:
        time.sleep(0.05)
    bench.close()

    assert len(keys(client)) == 3


def test_a_wrong_file_is_not_uploaded(bench, client, path):
    """The file does not match the hub's SHA-256."""
    wrong = bytearray(MODEL)
    wrong[-1] ^= 1
    path.write_bytes(wrong)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert bench.mirror.run_pending(None)

    assert keys(client) == []
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_an_upload_continues_after_a_deadline(port, client, path, monkeypatch):
    """On Lambda the next invocation uploads the remaining parts."""
    parts, now = [], [0.0]
    upload_part = client.upload_part

    def slow(**arguments):
        parts.append(arguments["PartNumber"])
        now[0] += 100.0
        return upload_part(**arguments)

    monkeypatch.setattr(client, "upload_part", slow)
    bench = Bench(port, client, clock=lambda: now[0])
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert not bench.mirror.run_pending(now[0] + 50)
    assert KEY not in keys(client)
    assert bench.mirror.run_pending(now[0] + 1000)
    bench.close()

    assert sorted(parts) == [1, 2, 3]
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL


def test_no_upload_starts_close_to_the_deadline(bench, client, path):
    """The remaining time belongs to the client's request."""
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert not bench.mirror.run_pending(time.monotonic() + 2)
    assert keys(client) == []


def test_a_locked_upload_is_postponed(bench, client, path):
    """Another process is uploading. The job stays and is retried later."""
    assert UploadLock(client, BUCKET, f"{KEY}.lock").acquire() == ""
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert not bench.mirror.run_pending(soon())
    assert keys(client) == [f"{KEY}.lock"]


def test_an_expired_lock_is_taken_over(port, client, path):
    """The unfinished upload of its holder is aborted."""
    left = client.create_multipart_upload(Bucket=BUCKET, Key=KEY)["UploadId"]
    dead = UploadLock(client, BUCKET, f"{KEY}.lock")
    dead.acquire()
    dead.renew(left, always=True)
    pass_time(client, 700)
    bench = Bench(port, client)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert bench.mirror.run_pending(None)
    bench.close()

    assert KEY in keys(client)
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    with pytest.raises(LockLost):
        dead.renew("", always=True)


def test_a_blob_is_never_overwritten(bench, client, path, monkeypatch):
    """The conditional completion stops an uploader that lost its lock unnoticed. The other upload has the same name and
    size and thus the same bytes, so only the manifest is written."""
    complete = client.complete_multipart_upload

    def late(**arguments):
        client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL)
        return complete(**arguments)

    monkeypatch.setattr(client, "complete_multipart_upload", late)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert bench.mirror.run_pending(None)
    etag = client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    assert "-" not in etag
    assert manifest(client).etag == etag


def test_a_blob_without_a_manifest_is_reused(bench, client, path, monkeypatch):
    """Its uploader died before it wrote the manifest. The next uploader only writes the manifest."""
    client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL)
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    monkeypatch.setattr(client, "create_multipart_upload", lambda **_: pytest.fail("uploaded again"))
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert bench.mirror.run_pending(None)
    assert bench.storage.resolve(REFERENCE, refresh=False).commit == COMMIT


def test_a_new_commit_of_the_same_bytes_reuses_the_blob(bench, client, path, monkeypatch):
    """The commit changed other files only."""
    bench.mirror.upload(REFERENCE, REMOTE, (path,))
    monkeypatch.setattr(client, "create_multipart_upload", lambda **_: pytest.fail("uploaded again"))
    later = dataclasses.replace(REMOTE, commit="e" * 40, resolved_at=time.time())
    bench.mirror.upload(REFERENCE, later, (path,))

    assert bench.storage.resolve(REFERENCE, refresh=False).commit == "e" * 40
    assert len([key for key in keys(client) if "blobs" in key]) == 1


DAMAGES = {
    "blob deleted": lambda client: client.delete_object(Bucket=BUCKET, Key=KEY),
    "blob cut short": lambda client: client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL[:-1]),
    "blob written anew": lambda client: client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL),
    "manifest empty": lambda client: client.put_object(Bucket=BUCKET, Key=MANIFEST, Body=b""),
    "manifest of another format": lambda client: client.put_object(Bucket=BUCKET, Key=MANIFEST, Body=b'{"format": 1}'),
    "manifest of another file": lambda client: client.put_object(
        Bucket=BUCKET,
        Key=MANIFEST,
        Body=dataclasses.replace(manifest(client), origin="hf://org/other/tiny.gguf@" + COMMIT).to_json(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_mirror_is_repaired(bench, client, path, damage):
    """The next offer repairs blob, manifest and lock."""
    bench.mirror.upload(REFERENCE, REMOTE, (path,))
    damage(client)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))
    assert bench.mirror.run_pending(None)

    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    assert manifest(client).etag == client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    assert bench.storage.resolve(REFERENCE, refresh=False).files[0].sha256 == SHA256
    assert f"{KEY}.lock" not in keys(client)


def test_a_manifest_of_another_file_is_ignored(bench, client, path):
    """It may have been copied from another model."""
    bench.mirror.upload(REFERENCE, REMOTE, (path,))
    DAMAGES["manifest of another file"](client)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


def test_a_late_manifest_is_refused(bench, client, path, monkeypatch):
    """An uploader that was suspended before its manifest does not overwrite a newer one."""
    put, theirs = client.put_object, Manifest(KEY, 1, SHA256, '"theirs"', 0, 1, (SHA256,)).to_json()

    def late(**arguments):
        if arguments["Key"] == MANIFEST:
            put(Bucket=BUCKET, Key=MANIFEST, Body=theirs)
        return put(**arguments)

    monkeypatch.setattr(client, "put_object", late)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert not bench.mirror.run_pending(None)
    assert client.get_object(Bucket=BUCKET, Key=MANIFEST)["Body"].read() == theirs


def test_the_ref_never_goes_back(bench, client, path):
    """A slow upload does not overwrite a ref that another process resolved later."""
    bench.mirror.upload(REFERENCE, dataclasses.replace(REMOTE, commit="e" * 40, resolved_at=2000.0), (path,))
    bench.mirror.upload(REFERENCE, dataclasses.replace(REMOTE, resolved_at=1000.0), (path,))
    assert ref(client) == Ref("e" * 40, 2000.0)

    bench.mirror.upload(REFERENCE, dataclasses.replace(REMOTE, resolved_at=3000.0), (path,))
    assert ref(client) == Ref(COMMIT, 3000.0)


def test_a_ref_from_the_future_is_replaced(bench, client, path):
    """A process with a wrong clock wrote it."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(OLD_COMMIT, time.time() + 9e9).to_json())
    bench.mirror.upload(REFERENCE, REMOTE, (path,))

    assert ref(client).commit == COMMIT


def test_parts_have_an_md5(bench, client, path, monkeypatch):
    """S3 thus refuses parts that were damaged in transit."""
    upload_part, wrong = client.upload_part, []

    def check(**arguments):
        md5 = base64.b64encode(hashlib.md5(arguments["Body"], usedforsecurity=False).digest()).decode()
        wrong.append(arguments["ContentMD5"] != md5)
        return upload_part(**arguments)

    monkeypatch.setattr(client, "upload_part", check)
    bench.mirror.upload(REFERENCE, REMOTE, (path,))

    assert wrong == [False] * 3


@pytest.mark.parametrize("body", [b"", b"[]", b'{"owner": 1}', b"\xff"])
def test_an_unreadable_lock_counts_as_locked(bench, client, path, body):
    """It raises no error between two answers."""
    client.put_object(Bucket=BUCKET, Key=f"{KEY}.lock", Body=body)
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert not bench.mirror.run_pending(None)


@pytest.mark.parametrize("error", [RuntimeError("new"), KeyError("date"), AssertionError()], ids=repr)
def test_an_unexpected_error_ends_only_the_job(port, client, path, monkeypatch, error):
    """The next offer is processed as usual."""

    def fail(**_):
        raise error

    bench = Bench(port, client, background=True)
    with monkeypatch.context() as patched:
        patched.setattr(client, "create_multipart_upload", fail)
        bench.mirror.offer(REFERENCE, REMOTE, (path,))
        end = soon()
        while bench.mirror._thread is not None and time.monotonic() < end:
            time.sleep(0.01)
    assert bench.mirror.run_pending(None)
    bench.mirror.upload(REFERENCE, REMOTE, (path,))
    bench.close()

    assert MANIFEST in keys(client)


def test_a_lock_survives_a_lost_answer(client, monkeypatch):
    """The repeated write is refused, but the lock was acquired by the first one."""
    put = client.put_object

    def twice(**arguments):
        put(**arguments)
        return put(**arguments)

    lock = UploadLock(client, BUCKET, f"{KEY}.lock")
    monkeypatch.setattr(client, "put_object", twice)
    assert lock.acquire() == ""
    lock.renew("note", always=True)
    monkeypatch.undo()
    lock.renew("note", always=True)
    lock.release()

    assert keys(client) == []


def test_release_does_not_delete_a_successors_lock(client):
    """The holder was suspended, with a clock that includes the pause or not."""
    for asleep in (0.0, 1000.0):
        clock = [0.0]
        late = UploadLock(client, BUCKET, f"{KEY}.lock", ttl=0.0, clock=lambda clock=clock: clock[0])
        assert late.acquire() is not None
        late._ttl = 600.0
        assert UploadLock(client, BUCKET, f"{KEY}.lock", ttl=0.0).acquire() == ""
        clock[0] = asleep
        late.release()

        assert keys(client) == [f"{KEY}.lock"]
        client.delete_object(Bucket=BUCKET, Key=f"{KEY}.lock")


@pytest.mark.parametrize("broken", [b"", b"{}", b"[1]", b'{"format": 3}', b"\xff", b"null"])
def test_a_malformed_manifest_is_ignored(bench, client, broken):
    """The model then counts as not mirrored."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    client.put_object(Bucket=BUCKET, Key=MANIFEST, Body=broken)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


@pytest.mark.parametrize("broken", [b"", b"c" * 40, b"[]", b'{"commit": "../..", "resolved_at": 1}', b'{"commit": 1}'])
def test_a_malformed_ref_is_ignored(bench, client, broken):
    """A ref must name a commit."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=broken)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


def test_without_write_permission_an_offer_is_dropped(bench, client, path, monkeypatch):
    """No error is raised."""
    forbidden = ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject")
    monkeypatch.setattr(client, "put_object", lambda **_: (_ for _ in ()).throw(forbidden))
    bench.mirror.offer(REFERENCE, REMOTE, (path,))

    assert bench.mirror.run_pending(None)


def test_upload_raises_its_error(bench, path):
    """Unlike `offer`, `upload` is called by a command."""
    path.write_bytes(MODEL[:-5])
    with pytest.raises(ModelUnavailable, match="sha256"):
        bench.mirror.upload(REFERENCE, REMOTE, (path,))


def test_a_denied_read_skips_the_mirror(port):
    """The store then uses the hub."""
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(Status(403, "AccessDenied"), times=5)
        reader = bucket(proxy.port)
        storage = S3Storage(bucket=lambda name: reader, mirror=reader, prefix="models")

        assert storage.resolve(REFERENCE, refresh=False) is None
        reader.close()


def test_ten_uploaders_upload_once(port, client, path):
    """They mirror the same model at once, each with its own client."""
    created, start = [], threading.Barrier(10)

    def upload():
        own = s3_client(port)
        own.meta.events.register("before-call.s3.CreateMultipartUpload", lambda **_: created.append(1))
        bench = Bench(port, own, retry_s=0.05)
        start.wait(60)
        bench.mirror.upload(REFERENCE, REMOTE, (path,))
        bench.close()
        own.close()

    with ThreadPoolExecutor(10) as pool:
        for uploader in [pool.submit(upload) for _ in range(10)]:
            uploader.result()

    assert len(created) == 1
    assert keys(client) == sorted([KEY, MANIFEST, REF])
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL


def test_a_killed_upload_is_completed_by_the_next(port, client, path):
    """After a kill -9 during an upload, the model counts as not mirrored until the next upload."""
    script = """
        import sys, time
        from pathlib import Path
        from tests.integration.s3_double import bucket, s3_client
        from tests.integration import test_s3_mirror as t
        client = s3_client(PORT)
        upload_part = client.upload_part
        def slow(**arguments):
            if arguments["PartNumber"] == 3:
                print("third", flush=True)
                time.sleep(60)
            return upload_part(**arguments)
        client.upload_part = slow
        t.Bench(PORT, client).mirror.upload(t.REFERENCE, t.REMOTE, (Path(sys.argv[1]),))
    """.replace("PORT", str(port))
    environ = {**clean_environ(), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout.readline() == b"third\n"
        child.send_signal(signal.SIGKILL)
    bench = Bench(port, client)
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    pass_time(client, 700)
    bench.mirror.upload(REFERENCE, REMOTE, (path,))

    assert bench.storage.resolve(REFERENCE, refresh=False) is not None
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    bench.close()


def test_a_manifest_is_validated():
    """A valid manifest is read as it was written. Contradicting fields are an error."""
    manifest = Manifest("blobs/a", 10, "a" * 64, '"etag"', 4, 4, ("b" * 64,) * 3, "hf://o/r/f@c")
    fields = json.loads(manifest.to_json())

    assert Manifest.from_json(manifest.to_json()) == manifest
    for name, wrong in {
        "key": None,
        "size_bytes": 13,
        "sha256": "a",
        "etag": "no quotes",
        "header_bytes": 11,
        "block_bytes": 0,
        "blocks": ["b" * 64] * 2,
        "origin": None,
    }.items():
        with pytest.raises(ValueError, match=r"."):
            Manifest.from_json(json.dumps({**fields, name: wrong}).encode())
