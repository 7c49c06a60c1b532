"""Send HTTP/1.1 requests over one keep-alive connection, with the standard library only.

This module knows neither AWS nor retries. It honours HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, as
huggingface_hub and boto3 do.
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
    """The connection failed before the response was complete. The message is for the log."""


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Return the context all connections share: reading the certificate store takes 10 to 30 ms.

    AWS_CA_BUNDLE replaces the store.
    """
    import ssl

    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)


def proxy_of(url: SplitResult) -> SplitResult | None:
    """Return the proxy that the environment names for a URL. Without one, urllib is not imported."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies_environment, proxy_bypass

    proxies = getproxies_environment()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or proxy.hostname is None:
        raise ConnectionBroken(f"a proxy must be http://host:port, got one with {proxy.scheme}://")
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
    """Reconnects when the host changes, when the last response was not read completely, and after `close`.

    One thread uses it; another may call `abort`. `timeout` (seconds) applies to connecting and to each read.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._host: tuple[str, str] = ("", "")
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._socket: socket.socket | None = None  # http.client drops its own after a response with Connection: close
        self._aborted = False

    def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> HTTPResponse:
        """Return the response; read its body with `read_into` or `read`. Raise ConnectionBroken."""
        parts = urlsplit(url)
        host = (parts.scheme, parts.netloc)
        if host != self._host or self._response is None or not self._response.isclosed():
            self.close()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = proxy_of(parts)
        if proxy is not None and parts.scheme == "http":  # a plain HTTP proxy needs the absolute URL
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
        """Fill `view` with the next bytes of the body. Raise ConnectionBroken if they do not come."""
        response = self._response
        if response is None:
            raise ConnectionBroken("no response is open")
        filled = 0
        with self._closed_by_failure():
            while filled < len(view):
                count = response.readinto(view[filled:])
                if count == 0:
                    raise ConnectionBroken(f"the response ended {len(view) - filled} bytes early")
                filled += count

    def read(self, most: int) -> bytes:
        """Return the rest of the body. Raise ConnectionBroken if it is longer than `most` bytes."""
        if self._response is None:
            raise ConnectionBroken("no response is open")
        with self._closed_by_failure():
            body = self._response.read(most + 1)
            if len(body) > most:
                raise ConnectionBroken(f"the response is longer than {most} bytes")
            if self._response.length:
                raise ConnectionBroken(f"the response ended {self._response.length} bytes early")
        if not self._response.isclosed():  # an empty body, or a response to HEAD
            self._response.close()
        return body

    @contextlib.contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        """Close the connection on any failure and raise ConnectionBroken."""
        try:
            yield
        except (OSError, HTTPException) as error:
            self.close()
            raise ConnectionBroken(f"{type(error).__name__}: {error}") from error
        except ConnectionBroken:
            self.close()
            raise

    def abort(self) -> None:
        """Interrupt another thread: a blocked read fails at once, a blocked connect fails after it returns."""
        self._aborted = True
        if (sock := self._socket) is not None:
            with contextlib.suppress(OSError):
                # Not `sock.shutdown`: SSLSocket's drops the TLS state, and queued data would pass as plain text.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        response, connection = self._response, self._connection
        self._response = self._connection = self._socket = None
        self._aborted = False
        if response is not None:
            response.close()
        if connection is not None:
            connection.close()
