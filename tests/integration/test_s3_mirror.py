"""The mirror against moto's S3: what is uploaded, by whom, and what a cold start then reads of it."""

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
FOUND = RemoteModel("huggingface", REFERENCE, (RemoteFile(REFERENCE.filename, len(MODEL), SHA256),), COMMIT)
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
    """A storage and a mirror on one bucket; `requests` counts what went to it."""

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
    """From now on S3's clock, as this client sees it, is ahead by so many seconds."""

    def shift(parsed, **_):
        headers = parsed["ResponseMetadata"]["HTTPHeaders"]
        date = email.utils.parsedate_to_datetime(headers["date"]) + datetime.timedelta(seconds=seconds)
        headers["date"] = email.utils.format_datetime(date, usegmt=True)

    client.meta.events.register("after-call.s3.GetObject", shift)


def soon(deadline=20.0):
    return time.monotonic() + deadline


def test_upload(bench, client, path):
    """What the hub delivered is uploaded with a manifest and a ref; no lock and no half upload stay behind."""
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert bench.mirror.run_pending(None)

    assert keys(client) == sorted([KEY, MANIFEST, REF])
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    written = manifest(client)
    assert (written.key, written.sha256) == (KEY, SHA256)
    assert written.header_bytes == gguf.read_header(path).data_offset
    assert written.blocks[1] == hashlib.sha256(MODEL[2 << 20 : 4 << 20]).hexdigest()
    assert written.origin == f"hf://org/repo/folder/tiny.gguf@{COMMIT}"
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_uploaded_once(bench, client, path):
    """A second offer of the same commit finds it there."""
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    bench.mirror.run_pending(None)
    written = []
    client.meta.events.register("before-call.s3", lambda model, **_: written.append(model.name))
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert bench.mirror.run_pending(None)

    assert written == ["PutObject"]  # of the ref, which was offered later


def test_resolve_by_ref_and_by_commit(bench, client, path):
    """A cold start trusts the ref; a refresh asks by commit only; an unknown branch or commit is not here."""
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    bench.mirror.run_pending(None)

    found = bench.storage.resolve(REFERENCE, refresh=False)
    assert (found.commit, found.files[0].sha256, found.size_bytes) == (COMMIT, SHA256, len(MODEL))
    assert bench.storage.resolve(REFERENCE, refresh=True) is None
    pinned = HuggingFace("org/repo", REFERENCE.filename, COMMIT)
    assert bench.storage.resolve(pinned, refresh=True).commit == COMMIT
    assert bench.storage.resolve(HuggingFace("org/repo", REFERENCE.filename, "v2"), refresh=False) is None
    assert bench.storage.resolve(HuggingFace("org/repo", "other.gguf"), refresh=False) is None


def test_ref_follows_the_branch(bench, client, path):
    """When the hub says that a branch means another commit now, the ref moves, whichever source brought the file."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(OLD_COMMIT, 1.0).to_json())
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    mirrored = RemoteModel("s3", REFERENCE, FOUND.files, COMMIT)
    bench.mirror.offer(REFERENCE, mirrored, (path,))
    bench.mirror.run_pending(None)

    assert ref(client).commit == COMMIT
    assert keys(client) == [REF]


def test_cold_start_offers_nothing(bench, client, path):
    """What came from the mirror by its own ref is not looked at again."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    bench.storage.resolve(REFERENCE, refresh=False)
    bench.mirror.offer(REFERENCE, RemoteModel("s3", REFERENCE, FOUND.files, COMMIT), (path,))

    assert bench.mirror.run_pending(0.0)


def test_split_model(bench, client, tmp_path):
    """Each file of a split model is uploaded; the model is there when all are."""
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


def test_background(port, client, path):
    """A server uploads in a thread of its own."""
    bench = Bench(port, client, background=True)
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    end = soon(30)
    while REF not in keys(client) and time.monotonic() < end:
        time.sleep(0.05)
    bench.close()

    assert len(keys(client)) == 3


def test_wrong_file_is_not_uploaded(bench, client, path):
    """A file that is not what the hub promised never becomes an object."""
    wrong = bytearray(MODEL)
    wrong[-1] ^= 1
    path.write_bytes(wrong)
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert bench.mirror.run_pending(None)

    assert keys(client) == []
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_in_sittings(port, client, path, monkeypatch):
    """On Lambda an upload goes on where the last invocation's deadline left it."""
    parts, now = [], [0.0]
    upload_part = client.upload_part

    def slow(**arguments):
        parts.append(arguments["PartNumber"])
        now[0] += 100.0
        return upload_part(**arguments)

    monkeypatch.setattr(client, "upload_part", slow)
    bench = Bench(port, client, clock=lambda: now[0])
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert not bench.mirror.run_pending(now[0] + 50)
    assert KEY not in keys(client)
    assert bench.mirror.run_pending(now[0] + 1000)
    bench.close()

    assert sorted(parts) == [1, 2, 3]
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL


def test_deadline_too_near(bench, client, path):
    """With little time left nothing is begun: the deadline is the client's, not ours."""
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert not bench.mirror.run_pending(time.monotonic() + 2)
    assert keys(client) == []


def test_lease_of_another(bench, client, path):
    """While another uploads, nothing is uploaded, and it is looked at again later."""
    assert UploadLock(client, BUCKET, f"{KEY}.lock").acquire() == ""
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert not bench.mirror.run_pending(soon())
    assert keys(client) == [f"{KEY}.lock"]


def test_lease_takeover(port, client, path):
    """A lock whose holder went silent is taken over, and what it had begun is cleared away."""
    left = client.create_multipart_upload(Bucket=BUCKET, Key=KEY)["UploadId"]
    dead = UploadLock(client, BUCKET, f"{KEY}.lock")
    dead.acquire()
    dead.renew(left, always=True)
    pass_time(client, 700)
    bench = Bench(port, client)
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert bench.mirror.run_pending(None)
    bench.close()

    assert KEY in keys(client)
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    with pytest.raises(LockLost):
        dead.renew("", always=True)


def test_loser_never_overwrites(bench, client, path, monkeypatch):
    """An uploader that lost its lock and does not know it is stopped by the conditional completion; what the other
    uploaded has the same name and size, so it is the same bytes: only the manifest is written."""
    complete = client.complete_multipart_upload

    def late(**arguments):
        client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL)
        return complete(**arguments)

    monkeypatch.setattr(client, "complete_multipart_upload", late)
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert bench.mirror.run_pending(None)
    etag = client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    assert "-" not in etag
    assert manifest(client).etag == etag


def test_blob_without_manifest(bench, client, path, monkeypatch):
    """A blob whose uploader died before the manifest is not in the mirror; the next one uploads nothing again."""
    client.put_object(Bucket=BUCKET, Key=KEY, Body=MODEL)
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    monkeypatch.setattr(client, "create_multipart_upload", lambda **_: pytest.fail("uploaded again"))
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert bench.mirror.run_pending(None)
    assert bench.storage.resolve(REFERENCE, refresh=False).commit == COMMIT


def test_another_commit_of_the_same_bytes(bench, client, path, monkeypatch):
    """Where a new commit changes other files only, the model is not uploaded again."""
    bench.mirror.upload(REFERENCE, FOUND, (path,))
    monkeypatch.setattr(client, "create_multipart_upload", lambda **_: pytest.fail("uploaded again"))
    later = dataclasses.replace(FOUND, commit="e" * 40, resolved_at=time.time())
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
def test_repairs_itself(bench, client, path, damage):
    """Whatever does not fit together is not served, and whole again after the next offer."""
    bench.mirror.upload(REFERENCE, FOUND, (path,))
    damage(client)
    bench.mirror.offer(REFERENCE, FOUND, (path,))
    assert bench.mirror.run_pending(None)

    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    assert manifest(client).etag == client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    assert bench.storage.resolve(REFERENCE, refresh=False).files[0].sha256 == SHA256
    assert f"{KEY}.lock" not in keys(client)


def test_manifest_of_another_file_is_passed_over(bench, client, path):
    """A manifest copied from elsewhere does not make its bytes this model's."""
    bench.mirror.upload(REFERENCE, FOUND, (path,))
    DAMAGES["manifest of another file"](client)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


def test_late_manifest_is_refused(bench, client, path, monkeypatch):
    """An uploader that was suspended before its manifest does not write over the one of its successor."""
    put, theirs = client.put_object, Manifest(KEY, 1, SHA256, '"theirs"', 0, 1, (SHA256,)).to_json()

    def late(**arguments):
        if arguments["Key"] == MANIFEST:
            put(Bucket=BUCKET, Key=MANIFEST, Body=theirs)
        return put(**arguments)

    monkeypatch.setattr(client, "put_object", late)
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert not bench.mirror.run_pending(None)
    assert client.get_object(Bucket=BUCKET, Key=MANIFEST)["Body"].read() == theirs


def test_ref_never_goes_back(bench, client, path):
    """An upload that took an hour does not overwrite what the hub has told another process meanwhile."""
    bench.mirror.upload(REFERENCE, dataclasses.replace(FOUND, commit="e" * 40, resolved_at=2000.0), (path,))
    bench.mirror.upload(REFERENCE, dataclasses.replace(FOUND, resolved_at=1000.0), (path,))
    assert ref(client) == Ref("e" * 40, 2000.0)

    bench.mirror.upload(REFERENCE, dataclasses.replace(FOUND, resolved_at=3000.0), (path,))
    assert ref(client) == Ref(COMMIT, 3000.0)


def test_ref_of_a_wrong_clock(bench, client, path):
    """A ref from the far future does not stay for ever."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(OLD_COMMIT, time.time() + 9e9).to_json())
    bench.mirror.upload(REFERENCE, FOUND, (path,))

    assert ref(client).commit == COMMIT


def test_parts_carry_their_md5(bench, client, path, monkeypatch):
    """S3 refuses a part that was damaged on its way."""
    upload_part, wrong = client.upload_part, []

    def check(**arguments):
        md5 = base64.b64encode(hashlib.md5(arguments["Body"], usedforsecurity=False).digest()).decode()
        wrong.append(arguments["ContentMD5"] != md5)
        return upload_part(**arguments)

    monkeypatch.setattr(client, "upload_part", check)
    bench.mirror.upload(REFERENCE, FOUND, (path,))

    assert wrong == [False] * 3


@pytest.mark.parametrize("body", [b"", b"[]", b'{"owner": 1}', b"\xff"])
def test_foreign_lease_object(bench, client, path, body):
    """A lock object that cannot be read is another's; nothing is raised between two answers."""
    client.put_object(Bucket=BUCKET, Key=f"{KEY}.lock", Body=body)
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert not bench.mirror.run_pending(None)


@pytest.mark.parametrize("error", [RuntimeError("new"), KeyError("date"), AssertionError()], ids=repr)
def test_nothing_escapes(port, client, path, monkeypatch, error):
    """Whatever goes wrong ends the job and not the process; the next offer is worked on as ever."""

    def fail(**_):
        raise error

    bench = Bench(port, client, background=True)
    with monkeypatch.context() as patched:
        patched.setattr(client, "create_multipart_upload", fail)
        bench.mirror.offer(REFERENCE, FOUND, (path,))
        end = soon()
        while bench.mirror._thread is not None and time.monotonic() < end:
            time.sleep(0.01)
    assert bench.mirror.run_pending(None)
    bench.mirror.upload(REFERENCE, FOUND, (path,))
    bench.close()

    assert MANIFEST in keys(client)


def test_lease_survives_a_lost_answer(client, monkeypatch):
    """A write that S3 did and whose answer was lost is refused when it is repeated; it is ours all the same."""
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


def test_release_leaves_the_lease_of_a_successor(client):
    """A holder that was suspended, with a clock that counts it or not, does not delete its successor's lock."""
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
def test_malformed_manifest(bench, client, broken):
    """A manifest that cannot be read counts as none."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=Ref(COMMIT, 1.0).to_json())
    client.put_object(Bucket=BUCKET, Key=MANIFEST, Body=broken)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


@pytest.mark.parametrize("broken", [b"", b"c" * 40, b"[]", b'{"commit": "../..", "resolved_at": 1}', b'{"commit": 1}'])
def test_malformed_ref(bench, client, broken):
    """A ref that names no commit counts as none."""
    client.put_object(Bucket=BUCKET, Key=REF, Body=broken)

    assert bench.storage.resolve(REFERENCE, refresh=False) is None


def test_no_right_to_write(bench, client, path, monkeypatch):
    """Where writing is forbidden, the offer is dropped at once, without an error for anyone."""
    forbidden = ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject")
    monkeypatch.setattr(client, "put_object", lambda **_: (_ for _ in ()).throw(forbidden))
    bench.mirror.offer(REFERENCE, FOUND, (path,))

    assert bench.mirror.run_pending(None)


def test_by_hand_says_why_not(bench, path):
    """The upload by hand raises what went wrong."""
    path.write_bytes(MODEL[:-5])
    with pytest.raises(ModelUnavailable, match="sha256"):
        bench.mirror.upload(REFERENCE, FOUND, (path,))


def test_denied_read_is_not_here(port):
    """A mirror that may not be read is passed over: the hub is asked instead."""
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(Status(403, "AccessDenied"), times=5)
        reader = bucket(proxy.port)
        storage = S3Storage(bucket=lambda name: reader, mirror=reader, prefix="models")

        assert storage.resolve(REFERENCE, refresh=False) is None
        reader.close()


def test_ten_uploaders_upload_once(port, client, path):
    """Ten uploaders that mirror the same model at once, each with its own client, upload one copy."""
    created, start = [], threading.Barrier(10)

    def upload():
        own = s3_client(port)
        own.meta.events.register("before-call.s3.CreateMultipartUpload", lambda **_: created.append(1))
        bench = Bench(port, own, retry_s=0.05)
        start.wait(60)
        bench.mirror.upload(REFERENCE, FOUND, (path,))
        bench.close()
        own.close()

    with ThreadPoolExecutor(10) as pool:
        for uploader in [pool.submit(upload) for _ in range(10)]:
            uploader.result()

    assert len(created) == 1
    assert keys(client) == sorted([KEY, MANIFEST, REF])
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL


def test_killed_uploader(port, client, path):
    """After a kill -9 amid an upload nothing passes for a model, and the next one uploads it whole."""
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
        t.Bench(PORT, client).mirror.upload(t.REFERENCE, t.FOUND, (Path(sys.argv[1]),))
    """.replace("PORT", str(port))
    environ = {**clean_environ(), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout.readline() == b"third\n"
        child.send_signal(signal.SIGKILL)
    bench = Bench(port, client)
    assert bench.storage.resolve(REFERENCE, refresh=False) is None
    pass_time(client, 700)
    bench.mirror.upload(REFERENCE, FOUND, (path,))

    assert bench.storage.resolve(REFERENCE, refresh=False) is not None
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == MODEL
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    bench.close()


def test_manifest_round_trip():
    """A manifest is read as it was written, and nothing that does not add up is taken for one."""
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
