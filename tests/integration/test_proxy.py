"""Reads of S3 use the proxy of the environment."""

from types import SimpleNamespace

import pytest

from adapters.aws.credentials import CredentialChain
from adapters.s3.bucket import Bucket, S3Response
from adapters.transfer.connection import Connection
from adapters.transfer.retry import Backoff
from core.errors import ModelUnavailable
from tests.http_server import QuietHandler, http_server
from tests.integration.s3_double import ENVIRON


@pytest.fixture
def proxy(monkeypatch):
    """Yield a proxy that answers every request itself. `proxy.requests` has (method, target, authorization)."""
    requests = []

    class Handler(QuietHandler):
        def do_GET(self):
            requests.append((self.command, self.path, self.headers["Proxy-Authorization"]))
            self.send_response(200 if self.command == "GET" else 403)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_CONNECT = do_GET

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with http_server(Handler) as port:
        yield SimpleNamespace(requests=requests, address=f"127.0.0.1:{port}")


def test_a_plain_http_request_goes_through_the_proxy(proxy, monkeypatch):
    """The proxy gets the full URL and its password."""
    monkeypatch.setenv("HTTP_PROXY", f"http://user:pa%40ss@{proxy.address}")
    connection = Connection(5)
    connection.send("GET", "http://minio.example:9000/models/key", {})

    assert connection.read(10) == b"ok"
    connection.close()
    assert proxy.requests == [("GET", "http://minio.example:9000/models/key", "Basic dXNlcjpwYUBzcw==")]


def test_https_goes_through_a_tunnel(proxy, monkeypatch):
    """If the proxy refuses the tunnel, the read raises ModelUnavailable."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.address)
    with pytest.raises(ModelUnavailable, match="could not be read"):
        Bucket("models", credentials=CredentialChain(ENVIRON), environ=ENVIRON, backoff=Backoff(0.001, 0.01)).get("key")

    assert proxy.requests[0][:2] == ("CONNECT", "models.s3.eu-central-1.amazonaws.com:443")


def test_no_proxy_hosts_are_reached_directly(proxy, monkeypatch):
    """NO_PROXY lists them."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    connection = Connection(5)
    connection.send("GET", f"http://{proxy.address}/key", {})

    assert connection.read(10) == b"ok"
    connection.close()
    assert proxy.requests == [("GET", "/key", None)]


def test_endless_redirects_between_regions_are_an_error():
    """Each region redirects to the other one."""
    urls = []

    class Elsewhere(Bucket):
        def _exchange(self, method, url, headers, most):
            urls.append(url)
            return S3Response(301, {"x-amz-bucket-region": "us-west-2" if "eu-central-1" in url else "eu-central-1"})

    with pytest.raises(ModelUnavailable):
        Elsewhere("models", credentials=CredentialChain(ENVIRON), environ=ENVIRON).get("key")
    assert len(urls) == 2
