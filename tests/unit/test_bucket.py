"""Bucket: when a connection is reused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.aws.credentials import CredentialChain
from adapters.s3 import bucket as module
from adapters.s3.bucket import Bucket
from tests.http_server import QuietHandler, http_server

ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-central-1"}


class Handler(QuietHandler):
    protocol_version = "HTTP/1.1"
    peers: list[int]

    def do_GET(self) -> None:
        self.peers.append(self.client_address[1])
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")


@pytest.fixture
def server() -> Iterator[tuple[Bucket, list[int]]]:
    peers: list[int] = []
    handler = type("Own", (Handler,), {"peers": peers})
    with http_server(handler) as port:
        url = f"http://127.0.0.1:{port}"
        bucket = Bucket("b", credentials=CredentialChain(ENVIRON), endpoint_url=url, environ=ENVIRON)
        try:
            yield bucket, peers
        finally:
            bucket.close()


def test_an_idle_connection_is_not_reused(server: tuple[Bucket, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a freeze or restore the peer has closed it. Only the wall clock shows the pause; it may run backwards."""
    bucket, peers = server
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])

    for seconds in (0, 1, 3600, 1, -7200):
        now[0] += seconds
        reply = bucket.get("key")
        assert reply is not None
        assert reply.body == b"ok"

    first, second, third, fourth, fifth = peers
    assert first == second
    assert len({second, third, fifth}) == 3
    assert third == fourth
