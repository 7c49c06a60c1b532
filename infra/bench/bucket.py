"""Serve a folder with nginx as S3 would serve a bucket, at full loopback speed or over a link of limited bandwidth.

nginx ignores signatures, and handles ranges, If-Match and 404 as S3 does. To install it: `apt-get install nginx-light`.

The link is a network namespace with a veth pair and a token bucket filter (`tc tbf`). This limits all connections
together and nothing else on the machine. nginx's `limit_rate` is not enough: it limits each request separately and lets
the bytes of the first second through at once, which is more than a range of 8 MiB. The link needs root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters.s3.manifest import Manifest
from adapters.s3.ref import Ref
from adapters.s3.source import Layout, origin
from adapters.transfer.transfer import BLOCK_BYTES
from core.store import gguf
from core.store.reference import HuggingFace
from infra.free_port import free_port

BUCKET, PREFIX = "bench", "models"
COMMIT = "b" * 40
ENVIRON = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
HOST, PEER = "198.18.77.1", "198.18.77.2"  # RFC 2544: for benchmarks

_CONFIG = """
daemon off; worker_processes 1; error_log stderr crit; pid {folder}/pid;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; sendfile_max_chunk 512k; tcp_nopush on; keepalive_requests 100000;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{ listen {address}:{port}{tls}; root {root}; default_type application/octet-stream; }}
}}
"""


def lay_out(root: Path, model: Path, repo: str) -> str:
    """Copy `model` into the mirror's layout under `root`, and add its manifest and ref. Return its key."""
    reference, layout, bucket = HuggingFace(repo, model.name), Layout(PREFIX), root / BUCKET
    whole, blocks = hashlib.sha256(), []
    with model.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    key = layout.blob(whole.hexdigest())
    copy = bucket / key
    copy.parent.mkdir(parents=True)
    shutil.copyfile(model, copy)
    stat = copy.stat()
    manifest = Manifest(
        key=key,
        size_bytes=stat.st_size,
        sha256=whole.hexdigest(),
        etag=f'"{int(stat.st_mtime):x}-{stat.st_size:x}"',  # nginx's format
        header_bytes=gguf.read_header(copy).data_offset,
        block_bytes=BLOCK_BYTES,
        blocks=tuple(blocks),
        origin=origin(reference, COMMIT, model.name),
    )
    pointers = {
        layout.manifest(reference, COMMIT, model.name): manifest.to_json(),
        layout.ref(reference): Ref(COMMIT, time.time()).to_json(),
    }
    for pointer, body in pointers.items():
        (bucket / pointer).parent.mkdir(parents=True, exist_ok=True)
        (bucket / pointer).write_bytes(body)
    return key


class Server:
    """An nginx that serves `root`, as a context manager.

    Set S3_ENDPOINT_URL to `url`, and add `environ` to a client's environment. With `tls` it uses a new self-signed
    certificate, which needs `openssl`.
    """

    def __init__(self, root: Path, *, megabytes_s: float | None = None, tls: bool = False) -> None:
        self._root, self._megabytes_s = root, megabytes_s
        self._namespace = f"bench{os.getpid()}" if megabytes_s is not None else None
        self._folder = tempfile.TemporaryDirectory(prefix="nginx-")
        self._nginx: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self._address = PEER if self._namespace else "127.0.0.1"
        self._certificate = Path(self._folder.name) / "certificate.pem" if tls else None
        self.url = f"{'https' if tls else 'http'}://{self._address}:{self._port}"
        self.environ = ENVIRON | ({"AWS_CA_BUNDLE": str(self._certificate)} if self._certificate else {})

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if nginx is None:
            raise SystemExit("nginx is not installed; run: apt-get install nginx-light")
        command = [nginx]
        if self._namespace is not None:
            self._link(self._namespace)
            command = ["ip", "netns", "exec", self._namespace, *command]
        config = Path(self._folder.name) / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                folder=self._folder.name,
                address=self._address,
                port=self._port,
                root=self._root.resolve(),
                tls=self._certify() if self._certificate else "",
            )
        )
        if os.geteuid() == 0:  # by default the workers run as the user "nobody", who cannot read these folders
            config.write_text("user root;\n" + config.read_text())
        self._nginx = subprocess.Popen([*command, "-c", str(config)], stdin=subprocess.DEVNULL)
        self._await()

    def _stop(self) -> None:
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait()
        if self._namespace is not None:
            # Delete the link first. Deleting the namespace would remove it too, but only after the command returns.
            subprocess.run(["ip", "link", "del", f"n{os.getpid()}"], check=False)
            subprocess.run(["ip", "netns", "del", self._namespace], check=False)
        self._folder.cleanup()

    def _link(self, namespace: str) -> None:
        if os.geteuid() != 0:
            raise SystemExit("limiting the bandwidth needs a network namespace, and that needs root: run it with sudo")
        near, far = f"n{os.getpid()}", f"f{os.getpid()}"
        bits = int((self._megabytes_s or 0) * 8e6)
        inside = ["ip", "netns", "exec", namespace]
        shape = [*inside, "tc", "qdisc", "add", "dev", far]
        commands = [
            ["ip", "netns", "add", namespace],
            ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace],
            ["ip", "addr", "add", f"{HOST}/30", "dev", near],
            ["ip", "link", "set", near, "mtu", "9000", "up"],
            [*inside, "ip", "addr", "add", f"{PEER}/30", "dev", far],
            [*inside, "ip", "link", "set", far, "mtu", "9000", "up"],
            [*shape, "root", "handle", "1:", "tbf", "rate", f"{bits}bit", "burst", "256kb", "latency", "50ms"],
        ]
        for command in commands:
            subprocess.run(command, check=True)

    def _certify(self) -> str:
        """Create a certificate. Return the parameters that nginx's `listen` needs for TLS."""
        key = f"{self._folder.name}/key.pem"
        subject = ["-subj", "/CN=bench", "-addext", f"subjectAltName=IP:{self._address}"]
        files = ["-keyout", key, "-out", str(self._certificate)]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
        subprocess.run(command, check=True, capture_output=True)
        return f" ssl; ssl_certificate {self._certificate}; ssl_certificate_key {key}; sendfile off"

    def _await(self) -> None:
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection((self._address, self._port), timeout=1):
                return
            time.sleep(0.02)
        raise SystemExit(f"nginx did not open port {self._port} within 8 s; its errors are above")
