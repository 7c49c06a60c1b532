"""Put a model into the image: `bake_model.py LOCAL_FOLDER TARGET_FOLDER`. Dockerfile.lambda runs it during the build.

MODEL_FILE is the GGUF file, or the first part of a split model. It is downloaded from MODEL_REPO on Hugging Face at
MODEL_REVISION (a branch, tag or commit), or copied from LOCAL_FOLDER if MODEL_REPO is empty. Its SHA-256 must equal
MODEL_SHA256 or, if that is empty, the digest in the repository. Without MODEL_FILE nothing happens.

A token cannot be passed, because build arguments stay readable in the image. Download a gated model first and bake the
file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def bake(local: Path, target: Path, environ: Mapping[str, str]) -> None:
    """Copy or download the model. Raise SystemExit with advice if it is missing or has the wrong digest."""
    repo, file = environ.get("MODEL_REPO", ""), environ.get("MODEL_FILE", "")
    if not file:
        if repo:
            raise SystemExit(f"MODEL_REPO is {repo!r}: MODEL_FILE must name the GGUF file in it.")
        return
    digests = [digest for digest in environ.get("MODEL_SHA256", "").lower().split(",") if digest]
    files = parts(file)
    if digests and len(digests) != len(files):
        raise SystemExit(f"MODEL_SHA256 must hold {len(files)} digests, one for each of {', '.join(files)}.")
    for number, name in enumerate(files):
        if repo:
            path, expected = download(repo, name, environ.get("MODEL_REVISION") or "main", target)
        else:
            path, expected = copy(local, name, target), None
        check(path, digests[number] if digests else expected)
        print(f"baked {path} ({path.stat().st_size} bytes)")
    shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's metadata of the download


def parts(file: str) -> list[str]:
    """Return all files of a split model from the name of its first, or just `file`."""
    split = re.fullmatch(r"(.*-)00001(-of-)(\d{5})(\.gguf)", file)
    if split is None:
        return [file]
    return [f"{split[1]}{number:05}{split[2]}{split[3]}{split[4]}" for number in range(1, int(split[3]) + 1)]


def copy(folder: Path, name: str, target: Path) -> Path:
    if not (folder / name).is_file():
        raise SystemExit(
            f"There is no {name!r} in the folder baked/. Put it there, or set MODEL_REPO to download it while building."
        )
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(folder / name, target / name))


def download(repo: str, name: str, revision: str, target: Path) -> tuple[Path, str | None]:
    """Return the file and its SHA-256 in the repository, which only files in large-file storage have."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        meta = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        path = hf_hub_download(repo, name, revision=meta.commit_hash or revision, local_dir=target)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise SystemExit(f"{name!r} could not be downloaded from {repo!r} at {revision!r}: {error}") from error
    digest = meta.etag if meta.etag and re.fullmatch(r"[0-9a-f]{64}", meta.etag) else None
    return Path(path), digest


def check(path: Path, expected: str | None) -> None:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SystemExit(f"{path.name} is not a GGUF file.")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected and digest != expected:
        raise SystemExit(
            f"{path.name} has the SHA-256 {digest}, expected {expected}. Correct MODEL_SHA256 or MODEL_REVISION."
        )


if __name__ == "__main__":
    bake(Path(sys.argv[1]), Path(sys.argv[2]), os.environ)
