"""S3 as a source: with moto and a faulty network, a read ends in a complete model or a clear error."""

import base64
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters.aws.credentials import CredentialChain
from adapters.aws.sigv4 import Credentials
from adapters.s3 import bucket as bucket_module
from adapters.s3.bucket import Bucket, Denied
from adapters.s3.mirror.mirror import S3Mirror
from adapters.s3.source import S3Storage
from adapters.transfer.retry import Backoff, RetryPolicy
from core.errors import InvalidRequest, ModelNotFound, ModelUnavailable
from core.store.reference import S3, HuggingFace
from core.store.source import DownloadCancelled, RemoteFile, RemoteModel
from core.store.store import Store
from tests import gguf_files
from tests.http_server import QuietHandler, http_server
from tests.integration.fault_proxy import FaultProxy, Header, Reset, Short, Stall, Status, WrongBytes
from tests.integration.memory import is_open
from tests.integration.s3_double import BUCKET, ENVIRON, bucket, clean_environ, moto_server, s3_client

COMMIT = "d" * 40
TENSOR = random.Random(6).randbytes(4 * 1024 * 1700)
MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (1024, 1700), TENSOR)])  # 7 MB: four blocks
SHA256 = hashlib.sha256(MODEL).hexdigest()
REFERENCE = HuggingFace("org/repo", "tiny.gguf")
REMOTE = RemoteModel("huggingface", REFERENCE, (RemoteFile("tiny.gguf", len(MODEL), SHA256),), COMMIT)
KEY = f"org/repo/{COMMIT}/tiny.gguf"  # the key of its manifest without the suffix


POLICY = RetryPolicy(stall_s=0.5, backoff=Backoff(0.001, 0.01))


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Run an S3 that mirrors MODEL and has it as plain objects, one with an odd name."""
    with moto_server() as port:
        client = s3_client(port)
        storage = S3Storage(lambda name: bucket(port, name), mirror=bucket(port))
        path = tmp_path_factory.mktemp("models") / "tiny.gguf"
        path.write_bytes(MODEL)
        mirror = S3Mirror(storage, BUCKET, "", lambda: client, background=False)
        mirror.upload(REFERENCE, REMOTE, (path,))
        mirror.close()
        client.put_object(Bucket=BUCKET, Key="plain.gguf", Body=MODEL)
        client.put_object(Bucket=BUCKET, Key="odd ~name+ü//(1).gguf", Body=MODEL)
        client.put_object(Bucket=BUCKET, Key="not.gguf", Body=b"<html>" * 1000)
        client.close()
        yield port


@pytest.fixture
def proxy(port):
    with FaultProxy("127.0.0.1", port) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy):
    made = []

    def make(name):
        made.append(bucket(proxy.port, name))
        return made[-1]

    yield S3Storage(make, mirror=make(BUCKET), threads=3, policy=POLICY)
    for each in made:
        each.close()


@pytest.fixture
def store(storage, tmp_path):
    return Store(tmp_path / "models", sources=(storage,), target="disk")


@pytest.fixture
def memory_store(storage, tmp_path):
    return Store(tmp_path / "models", sources=(storage,), target="memory")


def test_a_model_is_fetched_from_the_mirror(store):
    """Its hub reference names it. Commit and SHA-256 come from the mirror."""
    fetched = store.fetch(REFERENCE, refresh=False)

    assert fetched.path.read_bytes() == MODEL
    assert (fetched.source, fetched.commit, fetched.sha256) == ("s3", COMMIT, SHA256)


@pytest.mark.parametrize("key", [KEY, "plain.gguf"])
def test_an_object_is_fetched_by_key(store, key):
    """It may have a manifest or not."""
    assert store.fetch(S3(BUCKET, key)).path.read_bytes() == MODEL


def test_an_odd_key_is_signed_correctly(storage, store):
    """The key has blanks, plus signs, double slashes and umlauts."""
    remote = storage.resolve(S3(BUCKET, "odd ~name+ü//(1).gguf"), refresh=True)

    assert remote.size_bytes == len(MODEL)


def test_a_mirrored_model_is_opened_after_its_header(memory_store, proxy, tmp_path):
    """The manifest permits this; the rest arrives in the background."""
    proxy.plan(Stall(after=0, seconds=0.4), matching=r"bytes=6291456-")
    model = memory_store.open(REFERENCE)
    try:
        assert model.arrival is not None
        assert str(model.path).startswith("/proc/self/fd/")
        done, total = model.arrival.progress()
        assert 0 < done < total == len(MODEL)
        model.arrival.wait()
        assert model.path.read_bytes() == MODEL
        assert list(tmp_path.rglob("*.gguf")) == []
    finally:
        model.release()


def test_a_plain_object_is_opened_when_it_is_complete(memory_store):
    """It has no manifest."""
    model = memory_store.open(S3(BUCKET, "plain.gguf"))

    assert model.arrival is None
    assert model.path.read_bytes() == MODEL
    memory = model.path.stat()
    model.release()
    assert not is_open(model.path, memory)
    model.release()


def test_releasing_an_arriving_model_cancels_its_download(memory_store, proxy):
    """The memory is closed, too."""
    proxy.plan(Stall(after=0, seconds=60), times=20, matching=r"bytes=6291456-")
    model = memory_store.open(REFERENCE)
    memory = model.path.stat()
    model.release()

    with pytest.raises(ModelUnavailable, match="cancelled"):
        model.arrival.wait()
    assert not is_open(model.path, memory)


@pytest.mark.parametrize("reference", [REFERENCE, S3(BUCKET, "plain.gguf")], ids=str)
def test_a_model_in_memory_is_not_read_again(memory_store, proxy, reference):
    """Opened again, it is all there: by the manifest's sha256, or by the ETag of an object without a manifest."""
    proxy.plan(Stall(after=0, seconds=0.4), matching=r"bytes=6291456-")
    model = memory_store.open(reference)
    again = memory_store.open(reference)

    assert (again.path, again.arrival) == (model.path, None)
    memory = model.path.stat()
    model.discard()
    assert again.path.read_bytes() == MODEL
    again.release()
    assert not is_open(again.path, memory)


def test_a_model_that_did_not_arrive_is_not_shared(memory_store, proxy):
    """It is downloaded again, and its bytes are freed."""
    proxy.plan(Stall(after=0, seconds=60), times=20, matching=r"bytes=6291456-")
    model = memory_store.open(REFERENCE)
    model.arrival.cancel()
    with pytest.raises(ModelUnavailable):
        model.arrival.wait()
    proxy.heal()
    again = memory_store.open(REFERENCE)

    assert again.path != model.path
    model.release()
    again.discard()


FAULTS = [
    Reset(after=100_000),
    Short(after=100_000),
    WrongBytes(at=5000),
    Status(500),
    Status(503, "SlowDown"),
    Status(403, "ExpiredToken"),
    Stall(after=100_000),
]


@pytest.mark.parametrize("into", ["disk", "memory"])
@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_passing_fault_is_retried(storage, proxy, tmp_path, fault, into):
    """The model arrives complete on disk or in memory."""
    proxy.plan(fault, matching="(?i)range: bytes")
    model = Store(tmp_path, sources=(storage,), target=into).open(REFERENCE)
    if model.arrival is not None:
        model.arrival.wait()

    assert proxy.faults == 1
    assert model.path.read_bytes() == MODEL
    model.release()


@pytest.mark.parametrize("fault", [Status(500), Status(503, "SlowDown"), Reset(after=10), Short(after=10)], ids=repr)
def test_a_passing_fault_of_the_manifest_is_retried(store, proxy, fault):
    """The same applies to the ref."""
    proxy.plan(fault, matching="manifest|refs")

    assert store.fetch(REFERENCE, refresh=False).path.read_bytes() == MODEL
    assert proxy.faults == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Status(403, "AccessDenied"), "may not be read"),
        (Status(404, "NoSuchKey"), "no longer exists"),
        (Status(412, "PreconditionFailed"), "was replaced"),
        (Status(503, "SlowDown"), "reads failed"),
        (WrongBytes(), "wrong bytes"),
        (Reset(after=10), "reads failed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("into", ["disk", "memory"])
def test_a_lasting_fault_is_a_clear_error(storage, proxy, tmp_path, fault, message, into):
    """No model is left, and the next attempt succeeds."""
    proxy.plan(fault, times=1000, matching="(?i)range: bytes")
    store = Store(tmp_path, sources=(storage,), target=into)
    with pytest.raises(ModelUnavailable, match=message):
        store.open(REFERENCE)
    assert list(tmp_path.rglob("tiny.gguf")) == []

    proxy.heal()
    model = store.open(REFERENCE)
    if model.arrival is not None:
        model.arrival.wait()
    assert model.path.read_bytes() == MODEL
    model.release()


def test_an_interrupted_download_resumes(proxy, tmp_path):
    """Blocks on the disk are verified and not fetched again."""
    reader = bucket(proxy.port)
    storage = S3Storage(lambda name: reader, mirror=reader, threads=1)
    proxy.plan(Status(500), times=1000, matching=r"bytes=4194304-")
    store = Store(tmp_path, sources=(storage,), target="disk")
    with pytest.raises(ModelUnavailable):
        store.fetch(REFERENCE, refresh=False)
    proxy.heal()
    proxy.requests.clear()
    store.fetch(REFERENCE, refresh=False)
    reader.close()

    ranges = [line for _, _, head in proxy.requests for line in head.splitlines() if line.lower().startswith("range")]
    assert ranges == ["range: bytes=4194304-6291455", f"range: bytes=6291456-{len(MODEL) - 1}"]


def test_a_cancelled_download_leaves_no_model(storage, proxy, tmp_path):
    """It raises DownloadCancelled."""
    proxy.plan(Stall(after=0, seconds=60), times=20, matching=r"bytes=[1-9]")
    store = Store(tmp_path, sources=(storage,), target="disk")
    with pytest.raises(DownloadCancelled):
        store.fetch(REFERENCE, refresh=False, cancelled=lambda: True)

    assert list(tmp_path.rglob("tiny.gguf")) == []


def test_an_object_with_another_etag_is_refused(storage):
    """The object was replaced after its manifest, and versions must not be mixed."""
    remote = storage.resolve(REFERENCE, refresh=False)
    other = dataclasses.replace(remote, files=(dataclasses.replace(remote.files[0], etag='"another"'),))
    with pytest.raises(ModelUnavailable, match="was replaced"):
        storage.open_memory(other, name="m", progress=lambda *_: None, cancelled=lambda: False)


def test_a_missing_object_is_not_found(storage):
    """The error names the s3:// reference."""
    with pytest.raises(ModelNotFound, match=r"s3://models/none\.gguf"):
        storage.resolve(S3(BUCKET, "none.gguf"), refresh=True)


def test_a_missing_bucket_is_named(storage):
    """It is a ModelUnavailable."""
    with pytest.raises(ModelUnavailable, match="no bucket 'elsewhere'"):
        storage.resolve(S3("elsewhere", "none.gguf"), refresh=True)


def test_a_denied_object_names_the_missing_permission(storage, proxy):
    """A 403 of a named object raises Denied."""
    proxy.plan(Status(403, "AccessDenied"), times=9)
    proxy.plan(Status(403, "AccessDenied"), times=9, method="HEAD")
    with pytest.raises(Denied, match="s3:GetObject"):
        storage.resolve(S3(BUCKET, "plain.gguf"), refresh=True)


@pytest.mark.parametrize("into", ["disk", "memory"])
def test_an_object_that_is_not_a_gguf_is_refused(storage, tmp_path, into):
    """This applies on disk and in memory."""
    with pytest.raises(InvalidRequest, match="GGUF"):
        Store(tmp_path, sources=(storage,), target=into).open(S3(BUCKET, "not.gguf"))


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("sha256", base64.b64encode(hashlib.sha256(MODEL).digest()).decode()),
        ("crc32", base64.b64encode(zlib.crc32(MODEL).to_bytes(4, "big")).decode()),
    ],
)
def test_the_checksum_of_a_plain_object_is_checked(memory_store, proxy, algorithm, value):
    """S3 stores it with the object."""
    name = f"x-amz-checksum-{algorithm}"
    proxy.plan(Header(name, value), method="HEAD")
    memory_store.open(S3(BUCKET, "plain.gguf")).release()

    wrong = base64.b64encode(bytes(len(base64.b64decode(value)))).decode()
    proxy.plan(Header(name, wrong), times=2, method="HEAD")  # to memory, then to the disk
    with pytest.raises(ModelUnavailable, match="checksum"):
        memory_store.open(S3(BUCKET, "plain.gguf"))


def test_a_composite_checksum_is_ignored(memory_store, proxy):
    """It is a checksum of part checksums, so the bytes cannot be compared with it."""
    proxy.plan(Header("x-amz-checksum-sha256", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=-3"), method="HEAD")

    memory_store.open(S3(BUCKET, "plain.gguf")).release()


def test_the_region_of_a_redirect_is_used():
    """S3 names a bucket's region if a request goes to another one. Later requests use it."""
    chain = CredentialChain(ENVIRON)
    urls = []

    class Redirecting(Bucket):
        def _exchange(self, method, url, headers, most):
            urls.append(url)
            if "ap-south-1" in url and "ap-south-1" in headers["authorization"]:
                return bucket_module.S3Response(200, {}, b"here")
            return bucket_module.S3Response(301, {"x-amz-bucket-region": "ap-south-1"})

    redirected = Redirecting("models", credentials=chain, environ=ENVIRON)

    assert redirected.get("key").body == b"here"
    assert redirected.get("key").body == b"here"
    assert [url.split(".")[2] for url in urls] == ["eu-central-1", "ap-south-1", "ap-south-1"]


@pytest.mark.parametrize(
    ("name", "region", "endpoint", "expected"),
    [
        ("models", "eu-central-1", None, "https://models.s3.eu-central-1.amazonaws.com/a%20b/%2B.gguf"),
        ("my.models", "eu-central-1", None, "https://s3.eu-central-1.amazonaws.com/my.models/a%20b/%2B.gguf"),
        ("models", "cn-north-1", None, "https://models.s3.cn-north-1.amazonaws.com.cn/a%20b/%2B.gguf"),
        ("models", "eu-central-1", "http://minio:9000/", "http://minio:9000/models/a%20b/%2B.gguf"),
    ],
)
def test_buckets_are_addressed_by_host_or_by_path(name, region, endpoint, expected):
    """AWS is addressed by host. Names with dots, which no certificate covers, and MinIO are addressed by path."""
    made = Bucket(name, credentials=CredentialChain(ENVIRON), endpoint_url=endpoint, region=region)

    assert expected == made.url("a b/+.gguf")


def test_reading_from_s3_imports_no_boto3(port, tmp_path):
    """A cold start with credentials from the environment imports neither botocore nor huggingface_hub."""
    script = f"""
        import sys
        from pathlib import Path
        from adapters.wiring import build
        from core.settings import Settings
        from core.store import reference
        settings = Settings(models_dir=Path({str(tmp_path)!r}), s3_bucket={BUCKET!r}, s3_prefix="",
                            s3_endpoint_url="http://127.0.0.1:{port}", embedded_model="off", model_target="memory")
        store = build(settings, on_lambda=True).store
        model = store.open(reference.parse("hf://org/repo/tiny.gguf"))
        model.arrival.wait()
        assert model.path.stat().st_size == {len(MODEL)}
        assert store.idle(None)
        heavy = {{"boto3", "botocore", "huggingface_hub", "requests", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    environ = {**clean_environ(), "PYTHONPATH": str(Path.cwd())}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environ, capture_output=True, text=True, timeout=60
    )

    assert process.returncode == 0, process.stderr


# Credentials


@contextmanager
def credential_endpoint(lifetime_s=3600):
    """Run a container's credential endpoint, and yield its URL and its requests."""
    requests = []

    class Handler(QuietHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Authorization")))
            expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime_s))
            reply = {"AccessKeyId": f"key{len(requests)}", "SecretAccessKey": "s", "Token": "t"}
            body = json.dumps({**reply, "Expiration": expires}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http_server(Handler) as port:
        yield f"http://127.0.0.1:{port}/creds?x=1", requests


def test_credentials_come_from_the_environment():
    """Lambda sets these variables."""
    environ = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c"}

    assert CredentialChain(environ).get() == Credentials("a", "b", "c")


def test_credentials_come_from_the_container():
    """With SnapStart an endpoint returns them. They are cached while they are valid."""
    with credential_endpoint() as (url, requests):
        environ = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": url,
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "secret token",
        }
        chain = CredentialChain(environ)
        first, second = chain.get(), chain.get()

        assert (first.access_key, first.token) == ("key1", "t")
        assert first is second
        assert requests == [("/creds?x=1", "secret token")]
        assert chain.get(stale=first).access_key == "key2"


def test_credentials_are_renewed_before_they_expire(tmp_path):
    """Credentials that expire soon are not used. The token may be in a file."""
    token = tmp_path / "token"
    token.write_text("from a file\n")
    with credential_endpoint(lifetime_s=100) as (url, requests):
        environ = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": url,
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token),
        }
        chain = CredentialChain(environ)

        assert [chain.get().access_key, chain.get().access_key] == ["key1", "key2"]
        assert requests[0][1] == "from a file"


def test_a_credential_endpoint_must_be_local_or_https():
    """No request is sent to a foreign host over plain HTTP."""
    chain = CredentialChain({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/creds"})
    with pytest.raises(ModelUnavailable, match="https"):
        chain.get()


def test_missing_credentials_are_a_clear_error(monkeypatch, tmp_path):
    """The error names the variables."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ModelUnavailable, match="AWS_ACCESS_KEY_ID"):
        CredentialChain({}).get()
