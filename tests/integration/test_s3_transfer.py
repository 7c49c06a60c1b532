"""Ranged downloads from a server that fails in many ways."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.transfer.checksum import Sha256
from adapters.transfer.retry import Backoff, RetryPolicy
from adapters.transfer.transfer import Transfer
from core.errors import ModelUnavailable
from tests.integration.fault_proxy import FaultProxy, Header, Reset, Short, Stall, Status, WrongBytes
from tests.integration.range_server import PlainOrigin, RangeServer

BLOCK = 1000
BODY = random.Random(7).randbytes(20_500)
DIGESTS = [hashlib.sha256(BODY[at : at + BLOCK]).digest() for at in range(0, len(BODY), BLOCK)]


BACKOFF = Backoff(0.001, 0.01)


@pytest.fixture
def server():
    with RangeServer(BODY) as server:
        yield server


@pytest.fixture
def proxy(server):
    with FaultProxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture
def fd():
    fd = os.memfd_create("model")
    yield fd
    os.close(fd)


def transfer(origin, fd, *, stall=10.0, slow=30.0, **options):
    options["policy"] = RetryPolicy(stall_s=stall, slow_s=slow, backoff=BACKOFF)
    options = {"block_bytes": BLOCK, "digests": DIGESTS, "part_bytes": 4 * BLOCK, "threads": 3, **options}
    return Transfer(origin, fd, len(BODY), **options)


def content(fd):
    return os.pread(fd, 1 << 20, 0)


def test_all_bytes_arrive(server, fd):
    """They are in the right places."""
    download = transfer(PlainOrigin(server.url), fd)
    download.start()
    download.wait()

    assert content(fd) == BODY
    assert download.progress() == (len(BODY), len(BODY))


def test_without_digests_the_checksum_decides(server, fd):
    """It is the SHA-256 of the whole body."""
    download = transfer(PlainOrigin(server.url), fd, digests=None, checksum=Sha256(hashlib.sha256(BODY).hexdigest()))
    download.start()
    download.wait()

    assert content(fd) == BODY


def test_a_wrong_checksum_is_an_error(server, fd):
    """There are no digests of blocks."""
    download = transfer(PlainOrigin(server.url), fd, digests=None, checksum=Sha256("0" * 64))
    download.start()
    with pytest.raises(ModelUnavailable, match="wrong checksum"):
        download.wait()


def test_an_empty_object_is_complete_at_once(fd):
    """No request is needed."""
    download = Transfer(PlainOrigin("http://127.0.0.1:9"), fd, 0)
    download.start()
    download.wait()

    assert download.progress() == (0, 0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 5000),
    block=st.integers(1, 900),
    part=st.integers(1, 5000),
    threads=st.integers(1, 5),
    first=st.integers(0, 6000),
    data=st.data(),
)
def test_any_geometry_gives_the_right_bytes(server, size, block, part, threads, first, data):
    """An earlier attempt may have left right or wrong bytes."""
    if size // block > 200:
        block = size // 200
    body = server.body = random.Random(size).randbytes(size)
    digests = [hashlib.sha256(body[at : at + block]).digest() for at in range(0, size, block)]
    resume = data.draw(st.integers(0, size))
    left = bytearray(body[:resume])
    for _ in range(data.draw(st.integers(0, 3)) if resume else 0):
        left[data.draw(st.integers(0, resume - 1))] ^= 1
    fd = os.memfd_create("model")
    try:
        os.pwrite(fd, left, 0)
        options = {"block_bytes": block, "part_bytes": part, "threads": threads, "first_bytes": first}
        download = Transfer(PlainOrigin(server.url), fd, size, digests=digests, resume=resume, **options)
        download.start()
        download.wait()
        assert content(fd) == body
    finally:
        os.close(fd)
        server.body = BODY


def test_resume_reads_only_missing_blocks(server, fd):
    """A damaged block is fetched again."""
    left = bytearray(BODY[:10_700])
    left[3500] ^= 1
    os.pwrite(fd, left, 0)
    download = transfer(PlainOrigin(server.url), fd, resume=10_700, threads=1)
    download.start()
    download.wait()

    assert content(fd) == BODY
    assert server.requests[0] == "bytes=3000-3999"
    assert server.requests[1].startswith("bytes=10000-")


FAULTS = [
    Reset(after=0),
    Reset(after=1500),
    Short(after=0),
    Short(after=2500),
    WrongBytes(at=700),
    Status(500),
    Status(503, "SlowDown"),
    Status(403, "ExpiredToken"),
    Status(400, "ExpiredToken"),
    Stall(after=1200),
    Header("Content-Range", "bytes 0-1/2"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("times", [1, 3])
def test_a_passing_fault_is_retried(proxy, fd, fault, times):
    """No wrong byte remains."""
    if "Expired" in repr(fault):
        times = 1  # refused twice in a row is refused
    if isinstance(fault, WrongBytes):
        times = min(times, 2)  # one block may get all of them, and three in a row mean that the object is damaged
    proxy.plan(fault, times=times)
    download = transfer(PlainOrigin(proxy.url), fd, stall=0.3)
    download.start()
    download.wait()

    assert content(fd) == BODY
    assert proxy.faults == times


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Status(403, "AccessDenied"), "may not be read"),
        (Status(404, "NoSuchKey"), "no longer exists"),
        (Status(412, "PreconditionFailed"), "was replaced"),
        (Status(416, "InvalidRange"), "was replaced"),
        (Status(500), "reads failed"),
        (Status(503, "SlowDown"), "reads failed"),
        (WrongBytes(), "wrong bytes"),
        (Reset(after=10), "reads failed"),
        (Short(after=10), "reads failed"),
        (Status(200), "ignores the Range header"),
    ],
    ids=repr,
)
def test_a_lasting_fault_is_a_clear_error(proxy, server, fd, fault, message):
    """The next attempt resumes and succeeds."""
    proxy.plan(fault, times=1000)
    download = transfer(PlainOrigin(proxy.url), fd, stall=0.3)
    download.start()
    with pytest.raises(ModelUnavailable, match=message):
        download.wait()

    download = transfer(PlainOrigin(server.url), fd, resume=download.front())
    download.start()
    download.wait()
    assert content(fd) == BODY


def test_a_replaced_object_is_an_error(server, fd):
    """Two versions are never mixed."""
    download = transfer(PlainOrigin(server.url, etag='"v0"'), fd)
    download.start()
    with pytest.raises(ModelUnavailable, match="was replaced"):
        download.wait()


def test_a_403_renews_the_credentials(proxy, fd):
    """The request is then retried."""
    origin = PlainOrigin(proxy.url)
    proxy.plan(Status(403, "ExpiredToken"))
    download = transfer(origin, fd)
    download.start()
    download.wait()

    assert origin.renewals == 1


def test_an_unreachable_host_is_an_error(fd):
    """The host refuses connections."""
    download = transfer(PlainOrigin("http://127.0.0.1:9"), fd)
    download.start()
    with pytest.raises(ModelUnavailable, match="reads failed"):
        download.wait()


def test_wait_for_returns_with_the_first_bytes(proxy, fd):
    """Other bytes have not arrived yet."""
    proxy.plan(Stall(after=0, seconds=0.5), matching="bytes=20000-")
    download = transfer(PlainOrigin(proxy.url), fd, first_bytes=3500, stall=5)
    download.start()
    assert download.wait_for(3500, timeout=5)

    assert content(fd)[:3500] == BODY[:3500]
    download.wait()
    assert content(fd) == BODY


def test_a_stalled_block_is_overtaken(proxy, fd):
    """An idle thread fetches the block of a silent connection."""
    proxy.plan(Stall(after=0, seconds=60), matching="bytes=0-")
    download = transfer(PlainOrigin(proxy.url), fd, stall=60)
    download.start()

    assert download.finish(timeout=20)
    assert content(fd) == BODY


def test_a_slow_block_is_requested_again(proxy, fd):
    """The new request uses another connection, although no read timed out."""
    proxy.plan(Stall(after=500, seconds=60), matching="bytes=0-")
    download = transfer(PlainOrigin(proxy.url), fd, stall=60, slow=0.2, threads=1)
    download.start()

    assert download.finish(timeout=20)
    assert content(fd) == BODY


@pytest.mark.parametrize("threads", [1, 8])
def test_a_slow_link_keeps_received_bytes(fd, threads):
    """No block is complete in time. Its received bytes are used, and fewer connections share the link."""
    with RangeServer(BODY, rate=20_000) as server:
        download = transfer(PlainOrigin(server.url), fd, threads=threads, stall=2, slow=0.1)
        download.start()

        assert download.finish(timeout=30)
        assert content(fd) == BODY
        assert server.sent < 2 * len(BODY)


def test_the_etag_of_an_answer_is_checked(server, fd):
    """A server may ignore If-Match and send another version."""
    origin = PlainOrigin(server.url)
    origin.request = lambda first, last, renew=False: (f"{server.url}/object", {"Range": f"bytes={first}-{last}"})
    server.etag = '"v2"'
    download = transfer(origin, fd, digests=None)
    download.start()
    with pytest.raises(ModelUnavailable, match="was replaced"):
        download.wait()


def test_cancel_ends_a_waiting_download(proxy, fd):
    """It ends at once, and no thread writes afterwards."""
    proxy.plan(Stall(after=0, seconds=60), times=100, matching="bytes=[1-9]")
    download = transfer(PlainOrigin(proxy.url), fd, stall=60)
    download.start()
    download.wait_for(1)
    download.cancel()

    with pytest.raises(ModelUnavailable, match="cancelled"):
        download.wait()
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(10)
            assert not thread.is_alive()


def test_a_full_disk_is_a_clear_error(server, tmp_path):
    """The message says that there is no space left."""
    with open("/dev/full", "wb") as full:
        download = transfer(PlainOrigin(server.url), full.fileno())
        download.start()
        with pytest.raises(ModelUnavailable, match="no space left"):
            download.wait()


def test_a_frozen_process_reconnects(server, tmp_path):
    """It was stopped for longer than every timeout, as by Lambda's freeze."""
    target = tmp_path / "model"
    with FaultProxy("127.0.0.1", server.port) as proxy:
        proxy.plan(Stall(after=300, seconds=0.6), times=3)
        script = f"""
            import os, sys
            sys.path[:0] = {[str(p) for p in sys.path if p]!r}
            from tests.integration.range_server import PlainOrigin
            from adapters.transfer.retry import RetryPolicy
            from adapters.transfer.transfer import Transfer
            fd = os.open({str(target)!r}, os.O_RDWR | os.O_CREAT)
            download = Transfer(PlainOrigin({proxy.url!r}), fd, {len(BODY)}, block_bytes={BLOCK},
                                digests={DIGESTS!r}, threads=3, policy=RetryPolicy(stall_s=0.4))
            download.start()
            print("started", flush=True)
            download.wait()
        """
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"started\n"
            child.send_signal(signal.SIGSTOP)
            threading.Event().wait(1.2)
            child.send_signal(signal.SIGCONT)
            assert child.wait(30) == 0

    assert target.read_bytes() == BODY


def test_memory_use_is_limited(fd):
    """It depends on threads and blocks and not on the size of the object."""
    import tracemalloc

    size, block = 8 << 20, 1 << 16
    with RangeServer(bytes(size)) as server:
        digest = hashlib.sha256(bytes(block)).digest()
        options = {"block_bytes": block, "digests": [digest] * (size // block), "threads": 4, "part_bytes": 1 << 20}
        download = Transfer(PlainOrigin(server.url), fd, size, **options)
        server_side = 4 << 20  # a part in each of the server's threads
        tracemalloc.start()
        try:
            download.start()
            download.wait()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak < server_side + (1 << 20)
