"""A small Hugging Face Hub on loopback for the real huggingface_hub, with faults on demand.

HEAD and GET of `/{org}/{repo}/resolve/{revision}/{file}` answer as the hub does: headers with commit, linked ETag (the
SHA-256) and size, and a redirect to a second port (the "CDN") that serves the bytes, with ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = "c" * 40
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None  # required if set


@dataclass
class Fault:
    """A fault of the next `times` GETs (of the CDN) or HEADs."""

    on: str = "GET"
    status: int | None = None  # answer with this instead
    reset_after: int | None = None  # RST after this many body bytes
    close_after: int | None = None  # FIN after this many body bytes, short of Content-Length
    stall_after: int | None = None  # pause after this many body bytes
    stall_s: float = 5.0
    flip: bool = False  # wrong bytes
    etag: str | None = None  # another SHA-256 in the HEAD
    ignore_range: bool = False  # 200 and the whole file
    rate: int | None = None  # bytes per second
    times: int = 1


class HubDouble:
    """Use as `with HubDouble({...}) as hub: hub.url`. `hub.log` holds (method, path, range) of each request."""

    def __init__(self, repos: dict[str, Repo] | None = None) -> None:
        self.repos = repos or {}
        self.log: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.authorizations: list[tuple[str, str | None]] = []
        self.cdn_url: str | None = None  # redirect here instead of to this double's own CDN
        self.sent = 0  # body bytes in total
        self.most_at_once = 0  # the most bodies sent at the same time
        self._at_once = 0
        self._lock = threading.Lock()
        self._hub = _Server(self._answer_hub)
        self._cdn = _Server(self._answer_cdn)

    @property
    def url(self) -> str:
        return self._hub.url

    def __enter__(self) -> HubDouble:
        self._hub.start()
        self._cdn.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hub.stop()
        self._cdn.stop()

    @property
    def cdn_port(self) -> int:
        return self._cdn.port

    def add(self, repo_id: str, files: dict[str, bytes], **settings: object) -> Repo:
        self.repos[repo_id] = Repo(files, **settings)  # type: ignore[arg-type]
        return self.repos[repo_id]

    def gets(self, path: str = "") -> list[str | None]:
        """Return the Range headers of the CDN reads."""
        return [
            header
            for method, target, header in self.log
            if method == "GET" and target.startswith("/cdn") and path in target
        ]

    def _fault(self, method: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.on == method and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _answer_hub(self, handler: BaseHTTPRequestHandler) -> None:
        method = handler.command
        self.log.append((method, handler.path, handler.headers.get("Range")))
        self.authorizations.append(("hub", handler.headers.get("Authorization")))
        fault = self._fault("HEAD") if method == "HEAD" else None
        if fault is not None and fault.status is not None:
            return _say(handler, fault.status)
        resolve = _RESOLVE.fullmatch(handler.path)
        repo = self.repos.get(resolve["repo"]) if resolve else None
        if resolve is None or repo is None:
            return _say(handler, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo.gated:
            return _say(handler, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repo.token is not None and handler.headers.get("Authorization") != f"Bearer {repo.token}":
            return _say(handler, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        commit = repo.branches.get(resolve["revision"], repo.commit)
        if resolve["revision"] not in ("main", repo.commit, *repo.branches):
            return _say(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        content = repo.files.get(resolve["path"])
        if content is None:
            return _say(handler, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{(fault.etag if fault else None) or sha256}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.cdn_url or self._cdn.url}/cdn/{resolve['repo']}/{resolve['path']}",
        }
        return _say(handler, 302, headers)

    def _answer_cdn(self, handler: BaseHTTPRequestHandler) -> None:
        range_header = handler.headers.get("Range")
        self.log.append((handler.command, handler.path, range_header))
        self.authorizations.append(("cdn", handler.headers.get("Authorization")))
        fault = self._fault("GET") or Fault()
        if fault.status is not None:
            return _say(handler, fault.status)
        _, _, owner, name, path = handler.path.split("/", 4)
        content = self.repos[f"{owner}/{name}"].files[path]
        start, end = 0, len(content)
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", range_header or "")
        if ranged and not fault.ignore_range:
            start, end = int(ranged[1]), int(ranged[2] or len(content) - 1) + 1
        body = content[start:end]
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        handler.send_response(206 if ranged and not fault.ignore_range else 200)
        handler.send_header("Content-Length", str(len(body)))
        if ranged and not fault.ignore_range:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        handler.end_headers()
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._send(handler, body, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes, fault: Fault) -> None:
        cuts = [cut for cut in (fault.reset_after, fault.close_after, fault.stall_after) if cut is not None]
        stop = min([*cuts, len(body)])
        step = 64 << 10 if fault.rate is None else max(1, fault.rate // 50)
        for position in range(0, stop, step):
            piece = body[position : min(position + step, stop)]
            handler.wfile.write(piece)
            self.sent += len(piece)
            if fault.rate is not None:
                time.sleep(len(piece) / fault.rate)
        if stop == len(body):
            return
        handler.wfile.flush()
        handler.close_connection = True
        if fault.stall_after is not None:
            self._cdn.stopping.wait(fault.stall_s)
        if fault.reset_after is not None:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()


class _Server:
    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                try:
                    answer(self)
                except OSError:
                    self.close_connection = True  # the client went away

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                return None

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # a planned reset
                    super().finish()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                return None

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _say(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
