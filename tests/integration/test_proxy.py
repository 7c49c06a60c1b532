"""Reads of S3 behind a proxy: the environment's, as every other client's."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapters.aws.credentials import CredentialChain
from adapters.s3.bucket import Bucket, S3Response
from adapters.transfer.connection import Connection
from adapters.transfer.retry import Backoff
from core.errors import ModelUnavailable
from tests.integration.s3_double import ENVIRON


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that answers by itself; `proxy.seen` are (method, target, authorization)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.command, self.path, self.headers["Proxy-Authorization"]))
            self.send_response(200 if self.command == "GET" else 403)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = seen
        server.address = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def test_plain_http(proxy, monkeypatch):
    """A proxy of plain HTTP is given the whole address, and its password."""
    monkeypatch.setenv("HTTP_PROXY", f"http://user:pa%40ss@{proxy.address}")
    connection = Connection(5)
    connection.send("GET", "http://minio.example:9000/models/key", {})

    assert connection.read(10) == b"ok"
    connection.close()
    assert proxy.seen == [("GET", "http://minio.example:9000/models/key", "Basic dXNlcjpwYUBzcw==")]


def test_tunnel(proxy, monkeypatch):
    """HTTPS goes through a tunnel; a proxy that refuses is an error that a read survives by its name."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.address)
    with pytest.raises(ModelUnavailable, match="could not be read"):
        Bucket("models", credentials=CredentialChain(ENVIRON), environ=ENVIRON, backoff=Backoff(0.001, 0.01)).get("key")

    assert proxy.seen[0][:2] == ("CONNECT", "models.s3.eu-central-1.amazonaws.com:443")


def test_no_proxy(proxy, monkeypatch):
    """What NO_PROXY names is asked directly."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    connection = Connection(5)
    connection.send("GET", f"http://{proxy.address}/key", {})

    assert connection.read(10) == b"ok"
    connection.close()
    assert proxy.seen == [("GET", "/key", None)]


def test_two_regions_that_name_each_other():
    """A bucket that is always elsewhere ends in an error."""
    asked = []

    class Elsewhere(Bucket):
        def _exchange(self, method, url, headers, most):
            asked.append(url)
            return S3Response(301, {"x-amz-bucket-region": "us-west-2" if "eu-central-1" in url else "eu-central-1"})

    with pytest.raises(ModelUnavailable):
        Elsewhere("models", credentials=CredentialChain(ENVIRON), environ=ENVIRON).get("key")
    assert len(asked) == 2
