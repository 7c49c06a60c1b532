"""A model whose mirror is wrong: the hub is asked next, and a sha256 that was asked for is computed from the bytes."""

import hashlib
import json
import random

import pytest

from adapters.huggingface.source import Hub
from adapters.s3.mirror.mirror import S3Mirror
from adapters.s3.source import S3Storage
from adapters.transfer import transfer as ranged
from core.errors import InvalidRequest, ModelUnavailable
from core.store.reference import S3, HuggingFace, pin
from core.store.source import Damaged
from core.store.store import Store
from tests import gguf_files
from tests.integration.fault_proxy import FaultProxy, Header, Reset, Short, Status, WrongBytes
from tests.integration.hub_double import HubDouble, Repo
from tests.integration.s3_double import BUCKET, bucket, moto_server, s3_client

TENSOR = random.Random(11).randbytes(4 * 1024 * 1700)
MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (1024, 1700), TENSOR)])  # 7 MB: four blocks
EVIL = MODEL[:-1] + bytes([MODEL[-1] ^ 1])
SHA256, EVIL_SHA256 = hashlib.sha256(MODEL).hexdigest(), hashlib.sha256(EVIL).hexdigest()
REFERENCE = HuggingFace("org/repo", "tiny.gguf")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of milliseconds."""
    monkeypatch.setattr(ranged, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ranged, "LONGEST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def port():
    with moto_server() as port:
        yield port


@pytest.fixture
def client(port):
    client = s3_client(port)
    yield client
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=each["Key"])
    client.close()


@pytest.fixture
def hub():
    with HubDouble({"org/repo": Repo({"tiny.gguf": MODEL})}) as hub:
        yield hub


class Serving:
    """A mirror that holds MODEL, and stores that read it before they ask the hub."""

    def __init__(self, port, client, hub, folder):
        self.client, self.hub, self.folder = client, hub, folder
        self.reader = bucket(port)
        self.storage = S3Storage(lambda name: self.reader, mirror=self.reader, prefix="")
        self.mirror = S3Mirror(self.storage, BUCKET, "", lambda: client, background=False)
        seed = Store(folder / "seed", (Hub(hub.url, backoff_s=0.01),), self.mirror, target="disk")
        seed.fetch(REFERENCE)
        assert seed.idle(None)
        hub.log.clear()

    def store(self, target):
        sources = (self.storage, Hub(self.hub.url, backoff_s=0.01))
        return Store(self.folder / target, sources, self.mirror, target=target)

    def key(self, suffix=""):
        """The key of the mirrored object, or of what lies beside it."""
        keys = [each["Key"] for each in self.client.list_objects_v2(Bucket=BUCKET)["Contents"]]
        objects = [key for key in keys if "refs" not in key and not key.endswith(".json")]
        return objects[0] if not suffix else next(key for key in keys if key.endswith(suffix))

    def manifest(self, **changes):
        """Rewrite the manifest with these fields, and the object's own ETag."""
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
    """The bytes of an open model, once all are there."""
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
    """Where the mirror's tensors are wrong, the next try reads from the hub; then the mirror is whole again."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("memory")
    with pytest.raises(Damaged, match="wrong bytes"):
        arrived(store.open(REFERENCE))
    model = store.open(REFERENCE)

    assert model.source == "huggingface"
    assert arrived(model) == MODEL
    assert store.idle(None)
    again = serving.store("memory").open(REFERENCE)
    assert again.source == "s3"
    assert arrived(again) == MODEL


def test_disk_falls_back_to_the_hub(serving):
    """On its way to the disk the same try goes on with the hub; then the mirror is whole again."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("disk")

    assert store.fetch(REFERENCE, refresh=False).source == "huggingface"
    assert store.idle(None)
    assert arrived(serving.store("memory").open(REFERENCE)) == MODEL


def test_a_source_that_failed_is_asked_again(serving):
    """When the hub cannot help either, the mirror is asked again: what failed once may be right now."""
    serving.replace(EVIL)
    serving.manifest()
    store = serving.store("memory")
    with pytest.raises(Damaged):
        arrived(store.open(REFERENCE))
    serving.replace(MODEL)
    serving.manifest()
    serving.hub.repos["org/repo"].token = "not ours"

    assert arrived(store.open(REFERENCE)) == MODEL


def test_cancelling_blames_nobody(serving):
    """A model that is given up while it arrives is read from the same source the next time."""
    store = serving.store("memory")
    model = store.open(REFERENCE)
    model.arrival.cancel()
    model.release()

    again = store.open(REFERENCE)
    assert again.source == "s3"
    again.release()


def test_pin_is_computed_in_memory(serving):
    """A manifest that claims the pinned sha256 for other bytes is found out before the first decode."""
    serving.replace(EVIL)
    serving.manifest(blocks=digests(EVIL))
    store = serving.store("memory")
    with pytest.raises(Damaged, match="checksum"):
        arrived(store.open(pin(REFERENCE, (SHA256,))))

    assert arrived(store.open(pin(REFERENCE, (SHA256,)))) == MODEL


def test_pin_of_a_plain_object_in_memory(serving):
    """An s3:// object without any checksum of its own is held against the pin, too."""
    serving.client.put_object(Bucket=BUCKET, Key="plain.gguf", Body=EVIL)
    store = serving.store("memory")

    assert arrived(store.open(S3(BUCKET, "plain.gguf", (EVIL_SHA256,)))) == EVIL
    with pytest.raises((ModelUnavailable, InvalidRequest)):
        arrived(store.open(S3(BUCKET, "plain.gguf", (SHA256,))))


def test_mirror_of_another_version_than_the_pinned_one(serving):
    """A ref in the mirror that means another version than the pin is passed over; the hub's no is final."""
    serving.manifest(sha256=EVIL_SHA256)
    store = serving.store("memory")

    assert arrived(store.open(pin(REFERENCE, (SHA256,)))) == MODEL
    with pytest.raises(InvalidRequest, match="as asked"):
        store.open(pin(REFERENCE, ("0" * 64,)))


LASTING = [
    Reset(after=10),
    Short(after=10),
    WrongBytes(),
    Status(403, "AccessDenied"),
    Status(404, "NoSuchKey"),
    Status(412, "PreconditionFailed"),
    Status(503, "SlowDown"),
    Header("ETag", '"another"'),
]


@pytest.mark.parametrize("target", ["disk", "memory"])
@pytest.mark.parametrize("where", ["bytes=0-", r"bytes=2097152-", r"bytes=6291456-"], ids=["header", "middle", "last"])
@pytest.mark.parametrize("fault", LASTING, ids=repr)
def test_lasting_fault_of_the_mirror(serving, port, tmp_path, fault, where, target):
    """A fault of the mirror that lasts, in any block, ends in the hub's bytes: at once, or on the next try."""
    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(fault, times=100, matching=f"(?i)range: {where}")
        reader = bucket(proxy.port)
        storage = S3Storage(lambda name: reader, mirror=reader, threads=4, part_bytes=ranged.BLOCK_BYTES)
        store = Store(tmp_path / "models", (storage, Hub(serving.hub.url, backoff_s=0.01)), target=target)
        try:
            served = arrived(store.open(REFERENCE))
        except ModelUnavailable:
            assert target == "memory"
            served = arrived(store.open(REFERENCE))
        reader.close()

    assert served == MODEL
    assert proxy.faults
    assert serving.hub.gets()
