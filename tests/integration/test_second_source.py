"""When a source fails, the store uses another one or raises an error that names the failure. Pins are checked."""

import base64
import hashlib
import json
import random
from pathlib import Path
from typing import Literal

import pytest

from adapters.aws.credentials import CredentialChain
from adapters.huggingface.source import Hub
from adapters.s3.bucket import Bucket
from adapters.s3.mirror.mirror import S3Mirror
from adapters.s3.source import S3Storage
from adapters.transfer import transfer as ranged
from adapters.transfer.retry import Backoff, RetryPolicy
from core.errors import InvalidRequest, ModelUnavailable
from core.store.reference import S3, HuggingFace, pin
from core.store.source import Damaged, DownloadCancelled
from core.store.store import Store
from tests import gguf_files
from tests.integration.fault_proxy import (
    Drip,
    FaultProxy,
    Header,
    Reset,
    Short,
    Stall,
    Status,
    WholeBody,
    WrongBytes,
)
from tests.integration.hub_double import Fault, HubDouble, Repo
from tests.integration.s3_double import BUCKET, ENVIRON, bucket, moto_server, s3_client

TENSOR = random.Random(11).randbytes(4 * 1024 * 1700)
MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (1024, 1700), TENSOR)])  # 7 MB: four blocks
EVIL = MODEL[:-1] + bytes([MODEL[-1] ^ 1])
SHA256, EVIL_SHA256 = hashlib.sha256(MODEL).hexdigest(), hashlib.sha256(EVIL).hexdigest()
REFERENCE = HuggingFace("org/repo", "tiny.gguf")
MATRIX, PLAIN = "matrix", "plain.gguf"


QUICK = RetryPolicy(backoff=Backoff(0.001, 0.01))


def hub_source(hub: HubDouble, policy: RetryPolicy = QUICK, part_bytes: int = 0) -> Hub:
    return Hub(hub.url, policy=policy, part_bytes=part_bytes)


@pytest.fixture(scope="module")
def port():
    with moto_server() as port:
        yield port


@pytest.fixture(scope="module")
def mirrored(port, tmp_path_factory):
    """Mirror MODEL under the prefix MATRIX and store it as a plain object. No test changes them."""
    client = s3_client(port)
    reader = bucket(port)
    storage = S3Storage(lambda name: reader, mirror=reader, prefix=MATRIX)
    mirror = S3Mirror(storage, BUCKET, MATRIX, lambda: client, background=False)
    with HubDouble({"org/repo": Repo({"tiny.gguf": MODEL})}) as hub:
        seed = Store(tmp_path_factory.mktemp("seed"), (hub_source(hub),), mirror, target="disk")
        seed.fetch(REFERENCE)
        assert seed.idle(None)
    client.put_object(Bucket=BUCKET, Key=f"{MATRIX}/{PLAIN}", Body=MODEL)
    mirror.close()
    reader.close()
    client.close()


@pytest.fixture
def client(port):
    client = s3_client(port)
    yield client
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        if each["Key"].startswith(MATRIX):
            continue
        client.delete_object(Bucket=BUCKET, Key=each["Key"])
    client.close()


@pytest.fixture
def hub():
    with HubDouble({"org/repo": Repo({"tiny.gguf": MODEL})}) as hub:
        yield hub


class Serving:
    """A mirror of MODEL, and stores that read from it before the hub."""

    def __init__(self, port, client, hub, folder):
        self.client, self.hub, self.folder = client, hub, folder
        self.reader = bucket(port)
        self.storage = S3Storage(lambda name: self.reader, mirror=self.reader, prefix="", policy=QUICK)
        self.mirror = S3Mirror(self.storage, BUCKET, "", lambda: client, background=False)
        seed = Store(folder / "seed", (hub_source(hub),), self.mirror, target="disk")
        seed.fetch(REFERENCE)
        assert seed.idle(None)
        hub.log.clear()

    def store(self, target):
        sources = (self.storage, hub_source(self.hub))
        return Store(self.folder / target, sources, self.mirror, target=target)

    def key(self, suffix=""):
        """Return the key of the mirrored object, or the key with this suffix."""
        keys = [each["Key"] for each in self.client.list_objects_v2(Bucket=BUCKET)["Contents"]]
        keys = [key for key in keys if not key.startswith(MATRIX)]
        objects = [key for key in keys if key.startswith("blobs/")]
        return objects[0] if not suffix else next(key for key in keys if key.endswith(suffix))

    def manifest(self, **changes):
        """Rewrite the manifest with these fields and the object's current ETag."""
        key = self.key(".json")
        fields = json.loads(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        fields |= {"etag": self.client.head_object(Bucket=BUCKET, Key=self.key())["ETag"], **changes}
        self.client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(fields).encode())

    def replace(self, body):
        self.client.put_object(Bucket=BUCKET, Key=self.key(), Body=body)


@pytest.fixture
def serving(port, client, hub, tmp_path):
    serving = Serving(port, client, hub, tmp_path)
    yield serving
    serving.mirror.close()
    serving.reader.close()


def arrived(model):
    """Wait for all bytes of an open model, return them and release it."""
    try:
        if model.arrival is not None:
            model.arrival.wait()
        return model.path.read_bytes()
    finally:
        model.release()


def digests(body):
    return [
        hashlib.sha256(body[at : at + ranged.BLOCK_BYTES]).hexdigest() for at in range(0, len(body), ranged.BLOCK_BYTES)
    ]


def test_memory_falls_back_to_the_hub(serving):
    """If the mirror's tensors are wrong, the next attempt reads from the hub. Then the mirror is repaired."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("memory")
    with pytest.raises(Damaged, match="wrong bytes"):
        arrived(store.open(REFERENCE))
    model = store.open(REFERENCE)

    assert model.source == "huggingface"
    assert arrived(model) == MODEL
    assert store.idle(None)
    repaired = serving.store("memory").open(REFERENCE)
    assert repaired.source == "s3"
    assert arrived(repaired) == MODEL


def test_disk_falls_back_to_the_hub(serving):
    """A download to disk continues with the hub. Then the mirror is repaired."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("disk")

    assert store.fetch(REFERENCE, refresh=False).source == "huggingface"
    assert store.idle(None)
    assert arrived(serving.store("memory").open(REFERENCE)) == MODEL


def test_a_failed_source_is_tried_again(serving):
    """If the hub fails, too, the mirror is tried again, because it may work by then."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("memory")
    with pytest.raises(Damaged):
        arrived(store.open(REFERENCE))
    serving.replace(MODEL)
    serving.manifest()
    serving.hub.repos["org/repo"].token = "not ours"

    assert arrived(store.open(REFERENCE)) == MODEL


def test_cancelling_does_not_count_as_a_failure(serving):
    """The next attempt reads from the same source."""
    store = serving.store("memory")
    model = store.open(REFERENCE)
    model.arrival.cancel()
    model.release()

    second = store.open(REFERENCE)
    assert second.source == "s3"
    second.release()


def test_a_pin_is_checked_in_memory(serving):
    """A manifest that claims the pinned SHA-256 for other bytes is detected before the first decode."""
    serving.replace(EVIL)
    serving.manifest(blocks=digests(EVIL))
    store = serving.store("memory")
    with pytest.raises(Damaged, match="checksum"):
        arrived(store.open(pin(REFERENCE, (SHA256,))))

    assert arrived(store.open(pin(REFERENCE, (SHA256,)))) == MODEL


def test_a_pin_of_a_plain_object_is_checked_in_memory(serving):
    """The object has no checksum of its own."""
    serving.client.put_object(Bucket=BUCKET, Key="plain.gguf", Body=EVIL)
    store = serving.store("memory")

    assert arrived(store.open(S3(BUCKET, "plain.gguf", (EVIL_SHA256,)))) == EVIL
    with pytest.raises((ModelUnavailable, InvalidRequest)):
        arrived(store.open(S3(BUCKET, "plain.gguf", (SHA256,))))


def test_a_mirror_of_another_version_is_skipped(serving):
    """The version is not the pinned one. If the hub has another version, too, that is an error."""
    serving.manifest(sha256=EVIL_SHA256)
    store = serving.store("memory")

    assert arrived(store.open(pin(REFERENCE, (SHA256,)))) == MODEL
    with pytest.raises(InvalidRequest, match="not 0000"):
        store.open(pin(REFERENCE, ("0" * 64,)))


def test_cancelling_ends_a_retry_pause_of_the_hub(hub: HubDouble) -> None:
    """The download does not wait for the next attempt."""
    hub.faults.append(Fault(on="HEAD", status=503, times=100))
    source = hub_source(hub, RetryPolicy(backoff=Backoff(3600, 3600)))

    with pytest.raises(DownloadCancelled):
        source.resolve(REFERENCE, refresh=True, cancelled=lambda: bool(hub.log))


def test_cancelling_ends_a_retry_pause_of_the_mirror(port: int) -> None:
    """The download does not wait for the next attempt of S3."""
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(Status(503, "SlowDown"), times=100)
        reader = Bucket(
            BUCKET,
            credentials=CredentialChain(ENVIRON),
            endpoint_url=proxy.url,
            environ=ENVIRON,
            backoff=Backoff(3600, 3600),
        )
        storage = S3Storage(lambda name: reader, mirror=reader)
        with pytest.raises(DownloadCancelled):
            storage.resolve(REFERENCE, refresh=False, cancelled=lambda: proxy.faults > 0)
        reader.close()


FAULTS = {
    "reset": Reset(after=0),
    "short": Short(after=0),
    "stall": Stall(after=0),
    "drip": Drip(after=0),
    "wrong byte": WrongBytes(),
    "403": Status(403, "AccessDenied"),
    "404": Status(404, "NoSuchKey"),
    "412": Status(412, "PreconditionFailed"),
    "503": Status(503, "SlowDown"),
    "If-Match ignored": Header("ETag", '"another"'),
    "200 for a range": WholeBody(),
}
PLACES = {"header": 10, "middle": (2 << 20) + 10, "last": len(MODEL) - 800}  # bytes of the object
SURVIVED = {"drip"}  # with every source, because it is only slow
# The hub's ETag is not used, and its sequential download starts over if ranges are ignored.
SURVIVED_BY_HUB = SURVIVED | {"If-Match ignored", "200 for a range"}


def policy_for(fault: str) -> RetryPolicy:
    """Return a short timeout only for faults that wait for it, so that a busy machine does not affect the others."""
    return RetryPolicy(stall_s=0.1 if fault == "stall" else 5.0, attempts=3, backoff=Backoff(0.001, 0.01))


@pytest.mark.parametrize("target", ["disk", "memory"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_of_the_mirror_falls_back_to_the_hub(
    mirrored: None, hub: HubDouble, port: int, tmp_path: Path, fault: str, place: str, target: Literal["disk", "memory"]
) -> None:
    """The bytes are right for a fault in any block. In memory this may take a second attempt."""
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(FAULTS[fault], times=100, matching="(?i)range: ", at=PLACES[place])
        reader = bucket(proxy.port)
        storage = S3Storage(
            lambda name: reader,
            mirror=reader,
            prefix=MATRIX,
            threads=4,
            part_bytes=ranged.BLOCK_BYTES,
            policy=policy_for(fault),
        )
        store = Store(tmp_path / "models", (storage, hub_source(hub)), target=target)
        try:
            served = arrived(store.open(REFERENCE))
        except ModelUnavailable:
            assert target == "memory"
            served = arrived(store.open(REFERENCE))
        reader.close()

    assert served == MODEL
    assert proxy.faults
    assert bool(hub.gets()) == (fault not in SURVIVED)


@pytest.mark.parametrize("target", ["disk", "memory"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_of_a_plain_object_is_a_named_error(
    mirrored: None, port: int, tmp_path: Path, fault: str, place: str, target: Literal["disk", "memory"]
) -> None:
    """An s3:// object has no other source. Wrong bytes are never published."""
    reference = S3(BUCKET, f"{MATRIX}/{PLAIN}")
    checksum = base64.b64encode(bytes.fromhex(SHA256)).decode()
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(Header("x-amz-checksum-sha256", checksum), times=2, method="HEAD")  # S3 stores it; moto does not
        proxy.plan(FAULTS[fault], times=100, matching="(?i)range: ", at=PLACES[place])
        reader = bucket(proxy.port)
        storage = S3Storage(lambda name: reader, threads=4, part_bytes=ranged.BLOCK_BYTES, policy=policy_for(fault))
        store = Store(tmp_path / "models", (storage,), target=target)
        if fault in SURVIVED:
            assert arrived(store.open(reference)) == MODEL
        else:
            with pytest.raises(ModelUnavailable, match=PLAIN):
                arrived(store.open(reference))
        reader.close()

    assert proxy.faults > 1
    published = [path.name for path in (tmp_path / "models").rglob("*.gguf")]
    assert published == ([PLAIN] if target == "disk" and fault in SURVIVED else [])


@pytest.mark.parametrize("target", ["disk", "memory"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_of_the_hub_is_a_named_error(
    hub: HubDouble, tmp_path: Path, fault: str, place: str, target: Literal["disk", "memory"]
) -> None:
    """There is no mirror. The error names the file or the repository."""
    with FaultProxy("127.0.0.1", hub.cdn_port) as proxy:
        hub.cdn_url = proxy.url
        proxy.plan(FAULTS[fault], times=100, at=PLACES[place])
        source = hub_source(hub, policy_for(fault), part_bytes=ranged.BLOCK_BYTES)
        store = Store(tmp_path / "models", (source,), target=target)
        if fault in SURVIVED_BY_HUB:
            assert arrived(store.open(REFERENCE)) == MODEL
        else:
            with pytest.raises((ModelUnavailable, InvalidRequest), match=r"tiny\.gguf|org/repo"):
                arrived(store.open(REFERENCE))

    assert proxy.faults
