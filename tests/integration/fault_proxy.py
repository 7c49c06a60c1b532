"""A TCP proxy between a client and a server that breaks HTTP answers on demand.

    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.plan(Reset(after=1000), times=2)

Each planned fault changes one answer to a matching request; other answers pass unchanged. Each connection to the
server has one request (`Connection: close`), so a fault affects exactly the planned answer.
"""

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reset:
    """Send RST after this many bytes of the body."""

    after: int


@dataclass(frozen=True)
class Short:
    """Close the connection cleanly after this many bytes of the body."""

    after: int


@dataclass(frozen=True)
class WrongBytes:
    """Flip one byte of the body."""

    at: int = 0


@dataclass(frozen=True)
class Status:
    """Answer with this error."""

    status: int
    code: str = "InternalError"


@dataclass(frozen=True)
class Stall:
    """Pause for this many seconds after this many bytes of the body."""

    after: int
    seconds: float = 3600.0


@dataclass(frozen=True)
class Drip:
    """After this many bytes of the body, send `count` bytes in small pieces, then the rest."""

    after: int
    count: int = 600


@dataclass(frozen=True)
class WholeBody:
    """Ignore the Range header and send a 200 with the whole body."""


@dataclass(frozen=True)
class Header:
    """Replace a header of the answer."""

    name: str
    value: str


class FaultProxy:
    def __init__(self, host, port):
        self._upstream = (host, port)
        self._lock = threading.Lock()
        self._plan = []
        self.requests = []  # (method, target, headers)
        self.faults = 0  # how many faults were applied
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._closed = threading.Event()
        self._sockets = set()
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closed.set()
        self._listener.close()
        with self._lock:
            for each in self._sockets:
                each.close()

    def plan(self, fault, *, times=1, matching="", method="GET", at=None):
        """Apply `fault` to the next `times` answers to requests of this method whose target or headers match.

        With `at`, only answers that contain this byte of the object match, and the fault begins there.
        """
        with self._lock:
            self._plan.extend([(fault, re.compile(matching), method, at)] * times)

    def heal(self):
        """Remove all planned faults."""
        with self._lock:
            self._plan.clear()

    def _accept(self):
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._sockets.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        try:
            stream = client.makefile("rb")
            while not self._closed.is_set() and self._exchange(client, stream):
                pass
        except (OSError, ValueError):
            pass
        finally:
            stream.close()
            client.close()
            with self._lock:
                self._sockets.discard(client)

    def _exchange(self, client, stream):
        head = _head(stream)
        if not head:
            return False
        length = int(_field(head, b"content-length") or 0)
        body = stream.read(length)
        method, target = head.split(b" ", 2)[:2]
        with self._lock:
            self.requests.append((method.decode(), target.decode(), head.decode("latin-1")))
        fault = self._fault(method.decode(), head.decode("latin-1"))
        if isinstance(fault, Status):
            reply = f"<Error><Code>{fault.code}</Code></Error>".encode()
            reply = b"" if method == b"HEAD" else reply
            client.sendall(
                b"HTTP/1.1 %d Fault\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
                % (fault.status, len(reply))
                + reply
            )
            return True
        if isinstance(fault, WholeBody):
            head = re.sub(rb"(?i)\r\nrange: [^\r\n]*", b"", head)
        with socket.create_connection(self._upstream, timeout=30) as upstream:
            upstream.sendall(head.rstrip(b"\r\n") + b"\r\nConnection: close\r\n\r\n" + body)
            with upstream.makefile("rb") as answer:
                return self._answer(client, answer, fault, method == b"HEAD")

    def _answer(self, client, answer, fault, bodyless):
        head = _head(answer)
        head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)
        if isinstance(fault, Header):
            head = re.sub(rb"(?i)\r\n%s: [^\r]*" % fault.name.encode(), b"", head)
            head = head.rstrip(b"\r\n") + f"\r\n{fault.name}: {fault.value}\r\n\r\n".encode()
        body = b"" if bodyless else answer.read(int(_field(head, b"content-length") or 0))
        match fault:
            case WrongBytes(at) if body:
                at %= len(body)
                body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
            case Reset(after):
                client.sendall(head + body[:after])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.shutdown(socket.SHUT_RD)
                return False
            case Short(after):
                client.sendall(head + body[:after])
                return False
            case Drip(after, count):
                client.sendall(head + body[:after])
                for start in range(after, min(after + count, len(body)), 100):
                    if self._closed.wait(0.005):
                        return False
                    client.sendall(body[start : min(start + 100, after + count)])
                body, head = body[after + count :], b""
            case Stall(after, seconds):
                client.sendall(head + body[:after])
                end = time.monotonic() + seconds
                while time.monotonic() < end and not self._closed.wait(0.05):
                    pass
                body, head = body[after:], b""
        client.sendall(head + body)
        return True

    def _fault(self, method, head):
        with self._lock:
            for index, (fault, matching, fault_method, at) in enumerate(self._plan):
                if fault_method != method or not matching.search(head):
                    continue
                first, last = _range(head)
                if at is None or first <= at <= last:
                    del self._plan[index]
                    self.faults += 1
                    return fault if at is None else _shifted(fault, at - first)
        return None


def _range(head):
    """Return the first and last byte of a request's range."""
    ranged = re.search(r"(?i)\nrange: bytes=(\d+)-(\d*)", head)
    return (int(ranged[1]), int(ranged[2] or 1 << 62)) if ranged else (0, 1 << 62)


def _shifted(fault, offset):
    match fault:
        case WrongBytes():
            return WrongBytes(offset)
        case Reset() | Short() | Stall() | Drip():
            return replace(fault, after=offset)
    return fault


def _head(stream):
    lines = []
    while (line := stream.readline(65537)) not in (b"\r\n", b"\n", b""):
        lines.append(line)
    return b"".join(lines) + b"\r\n" if lines else b""


def _field(head, name):
    match = re.search(rb"(?im)^%s: *([^\r\n]*)" % name, head)
    return match[1] if match else None
