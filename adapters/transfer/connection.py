"""Connection: one keep-alive HTTP/1.1 connection to whatever host the URL names, on the standard library.

Knows no AWS and no retries. HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY count, as for the hub and boto3.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import socket
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

if TYPE_CHECKING:
    import ssl

USER_AGENT = "slm-api-server"


class ConnectionBroken(Exception):
    """The connection failed before the answer was whole. The message is for the log."""


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One for all connections: reading the certificate store takes 10 to 30 ms. AWS_CA_BUNDLE replaces the store."""
    import ssl

    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)


def proxy_of(url: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a URL. Looks no further unless there is one: it costs an import."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies_environment, proxy_bypass

    proxies = getproxies_environment()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or proxy.hostname is None:
        raise ConnectionBroken(f"a proxy is named http://host:port, got one with {proxy.scheme}://")
    return proxy


def proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _connect(url: SplitResult, proxy: SplitResult | None, timeout: float) -> HTTPConnection:
    host, port = url.hostname or "", url.port
    if url.scheme == "https":
        via = (host, port) if proxy is None else (proxy.hostname or "", proxy.port or 80)
        secure = HTTPSConnection(*via, timeout=timeout, context=tls_context())
        if proxy is not None:
            secure.set_tunnel(host, port or 443, proxy_headers(proxy))
        secure.connect()
        return secure
    plain = HTTPConnection(
        *((host, port) if proxy is None else (proxy.hostname or "", proxy.port or 80)), timeout=timeout
    )
    plain.connect()
    return plain


class Connection:
    """Reconnects when the host changes, when the last answer was not read to its end, and after `close`.

    One thread uses it; `abort` may come from another. `timeout` is in seconds, for connecting and for each read.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._host: tuple[str, str] = ("", "")
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._socket: socket.socket | None = None  # http.client forgets its own once the answer is the last
        self._aborted = False

    def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> HTTPResponse:
        """The answer, its body still to be read with `read_into` or `read`. Raises ConnectionBroken."""
        parts = urlsplit(url)
        host = (parts.scheme, parts.netloc)
        if host != self._host or self._response is None or not self._response.isclosed():
            self.close()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = proxy_of(parts)
        if proxy is not None and parts.scheme == "http":  # a proxy of plain HTTP wants the whole address
            target = f"{parts.scheme}://{parts.netloc}{target}"
            headers = {**headers, **proxy_headers(proxy)}
        with self._closed_by_failure():
            connection = self._connection
            if connection is None:
                connection = _connect(parts, proxy, self._timeout)
                self._connection, self._host, self._socket = connection, host, connection.sock
            if self._aborted:
                raise ConnectionBroken("aborted")
            connection.request(method, target, body, {"User-Agent": USER_AGENT, **headers})
            self._response = connection.getresponse()
        return self._response

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes of the answer. Raises ConnectionBroken if they do not come."""
        response = self._response
        if response is None:
            raise ConnectionBroken("no answer is open")
        filled = 0
        with self._closed_by_failure():
            while filled < len(view):
                count = response.readinto(view[filled:])
                if count == 0:
                    raise ConnectionBroken(f"the answer ended {len(view) - filled} bytes early")
                filled += count

    def read(self, most: int) -> bytes:
        """The rest of the answer, but no more than `most` bytes: then ConnectionBroken."""
        if self._response is None:
            raise ConnectionBroken("no answer is open")
        with self._closed_by_failure():
            body = self._response.read(most + 1)
            if len(body) > most:
                raise ConnectionBroken(f"the answer is longer than {most} bytes")
            if self._response.length:
                raise ConnectionBroken(f"the answer ended {self._response.length} bytes early")
        if not self._response.isclosed():  # of length nought, or a HEAD's
            self._response.close()
        return body

    @contextlib.contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        """Whatever fails inside closes the connection and is ConnectionBroken."""
        try:
            yield
        except (OSError, HTTPException) as error:
            self.close()
            raise ConnectionBroken(f"{type(error).__name__}: {error}") from error
        except ConnectionBroken:
            self.close()
            raise

    def abort(self) -> None:
        """Let what blocks in another thread fail: a read at once, connecting when it is through."""
        self._aborted = True
        if (sock := self._socket) is not None:
            with contextlib.suppress(OSError):
                # Not `sock.shutdown`: SSLSocket's forgets its TLS state; what is queued would pass as plain text.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        response, connection = self._response, self._connection
        self._response = self._connection = self._socket = None
        self._aborted = False
        if response is not None:
            response.close()
        if connection is not None:
            connection.close()
