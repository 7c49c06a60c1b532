"""Mirror a model by hand: `python -m infra.mirror hf://org/repo/file.gguf[@revision] s3://bucket/prefix`.

Downloads it as the server would (HF_TOKEN, HF_ENDPOINT, S3_ENDPOINT_URL and AWS's own variables count), into a folder
that is gone afterwards, and uploads it into the layout that a cold start reads, with its manifest and ref. What is
there already is not uploaded again.
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

from adapters.s3.mirror.mirror import S3Mirror, boto3_client
from adapters.wiring import s3, sources
from core.errors import ApiError, InvalidRequest
from core.settings import Settings, SettingsError
from core.store.reference import HuggingFace, parse
from core.store.source import RemoteModel
from core.store.store import Store


class Bar:
    """A progress bar on standard error: redrawn in a terminal, a line now and then elsewhere."""

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
        share = done / total if total else 0.0
        rate = done / max(1e-3, now - self._begun) / 1e6
        filled = "#" * int(share * 30)
        text = f"{self._label} [{filled:<30}] {share:4.0%} of {total / 1e6:,.0f} MB, {rate:,.0f} MB/s"
        sys.stderr.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._terminal and self._drawn:
            sys.stderr.write("\n")


class Offered:
    """A `core.store.source.Mirror` that keeps what it was offered, to be uploaded in the foreground."""

    def __init__(self) -> None:
        self.offer_made: tuple[HuggingFace, RemoteModel, tuple[Path, ...]] | None = None

    def offer(self, reference: HuggingFace, found: RemoteModel, paths: tuple[Path, ...]) -> None:
        self.offer_made = (reference, found, paths)

    def distrust(self, found: RemoteModel) -> None:
        return None

    def run_pending(self, deadline: float | None) -> bool:
        return True


def mirror(reference: HuggingFace, settings: Settings, folder: Path) -> None:
    """Download into `folder`, upload to `settings.s3_bucket`. Raises ApiError, saying what went wrong."""
    assert settings.s3_bucket is not None
    hub = tuple(source for source in sources(settings) if source.authority)
    offered = Offered()
    bar = Bar("download")
    try:
        Store(folder, sources=hub, mirror=offered).fetch(reference, progress=bar)
    finally:
        bar.end()
    assert offered.offer_made is not None  # the folder was empty, so it was fetched
    client = functools.partial(boto3_client, settings.s3_endpoint_url)
    uploader = S3Mirror(s3(settings), settings.s3_bucket, settings.s3_prefix, client, background=False)
    bar = Bar("upload")
    try:
        uploader.upload(*offered.offer_made, progress=bar)
    finally:
        bar.end()
        uploader.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.mirror", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="hf://org/repo/file.gguf[@revision]")
    parser.add_argument("target", help="s3://bucket/prefix, as S3_BUCKET and S3_PREFIX will be")
    parser.add_argument("--folder", type=Path, help="where the download lies meanwhile (default: the system's)")
    options = parser.parse_args(argv)
    scheme, _, rest = options.target.partition("://")
    bucket, _, prefix = rest.partition("/")
    try:
        reference = parse(options.model)
        if scheme != "s3" or not bucket:
            raise InvalidRequest(f"The target is s3://bucket/prefix, got {options.target!r}.")
        if not isinstance(reference, HuggingFace):
            raise InvalidRequest(f"What is mirrored is named hf://org/repo/file.gguf@revision, got {options.model!r}.")
        settings = Settings.from_env(os.environ)
        settings = dataclasses.replace(settings, s3_bucket=bucket, s3_prefix=prefix.strip("/"), s3_mirror="write")
        with tempfile.TemporaryDirectory(prefix="mirror-", dir=options.folder) as folder:
            mirror(reference, settings, Path(folder))
    except (SettingsError, ApiError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"mirrored: serve it with S3_BUCKET={bucket} S3_PREFIX={prefix.strip('/')} MODEL_PATH={reference}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
