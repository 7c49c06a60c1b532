"""Copy a model from Hugging Face to S3: `python -m infra.mirror hf://org/repo/file.gguf[@revision] s3://bucket/prefix`.

The model is downloaded to a temporary folder and uploaded in the layout that a cold start reads, with its manifest and
ref. Objects that exist are not uploaded again. HF_TOKEN, HF_ENDPOINT, S3_ENDPOINT_URL and the AWS variables apply.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from adapters.local.terminal import CLEAR, amount
from adapters.s3.mirror.mirror import S3Mirror, boto3_client
from adapters.wiring import s3, sources
from core.errors import ApiError, InvalidRequest
from core.settings import Settings, SettingsError
from core.store.reference import HuggingFace, parse
from core.store.source import RemoteModel
from core.store.store import Store


class Progress:
    """Show progress on standard error: a line that is redrawn in a terminal, or a line every 5 s elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._begun = time.monotonic()
        self._drawn = 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._drawn < (0.1 if self._terminal else 5.0) and done != total:
            return
        self._drawn = now
        rate = done / max(1e-3, now - self._begun) / 1e6
        text = f"{self._label}{amount(done, total)}, {rate:,.0f} MB/s"
        sys.stderr.write(f"{CLEAR}{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._terminal and self._drawn:
            sys.stderr.write("\n")


class Recorder:
    """A `core.store.source.Mirror` that records the offered model, so that it can be uploaded in the foreground."""

    def __init__(self) -> None:
        self.offered: tuple[HuggingFace, RemoteModel, tuple[Path, ...]] | None = None

    def offer(self, reference: HuggingFace, remote: RemoteModel, paths: tuple[Path, ...]) -> None:
        self.offered = (reference, remote, paths)

    def distrust(self, remote: RemoteModel) -> None:
        return None

    def run_pending(self, deadline: float | None) -> bool:
        return True


def mirror(reference: HuggingFace, settings: Settings, folder: Path) -> None:
    """Download into `folder`, then upload to `settings.s3_bucket`. Raise ApiError if either fails."""
    assert settings.s3_bucket is not None
    hub = tuple(source for source in sources(settings) if source.authority)
    recorder = Recorder()
    progress = Progress("download")
    try:
        Store(folder, sources=hub, mirror=recorder).fetch(reference, progress=progress)
    finally:
        progress.end()
    assert recorder.offered is not None  # the folder was empty, so the model was downloaded
    client = functools.partial(boto3_client, settings.s3_endpoint_url)
    uploader = S3Mirror(s3(settings), settings.s3_bucket, settings.s3_prefix, client, background=False)
    progress = Progress("upload")
    try:
        uploader.upload(*recorder.offered, progress=progress)
    finally:
        progress.end()
        uploader.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.mirror", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("model", help="hf://org/repo/file.gguf[@revision]")
    parser.add_argument("target", help="s3://bucket/prefix: what S3_BUCKET and S3_PREFIX will be set to")
    parser.add_argument("--folder", type=Path, help="folder for the temporary download (default: the system's)")
    options = parser.parse_args(argv)
    scheme, _, rest = options.target.partition("://")
    bucket, _, prefix = rest.partition("/")
    try:
        reference = parse(options.model)
        if scheme != "s3" or not bucket:
            raise InvalidRequest(f"The target must be s3://bucket/prefix, got {options.target!r}.")
        if not isinstance(reference, HuggingFace):
            raise InvalidRequest(f"The model must be hf://org/repo/file.gguf[@revision], got {options.model!r}.")
        settings = Settings.from_env(os.environ)
        settings = dataclasses.replace(settings, s3_bucket=bucket, s3_prefix=prefix.strip("/"), s3_mirror="write")
        with tempfile.TemporaryDirectory(prefix="mirror-", dir=options.folder) as folder:
            mirror(reference, settings, Path(folder))
    except (SettingsError, ApiError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Mirrored. Serve it with S3_BUCKET={bucket} S3_PREFIX={prefix.strip('/')} MODEL_PATH={reference}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
