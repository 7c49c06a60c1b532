"""Put a model into the image: `bake_model.py LOCAL_FOLDER TARGET_FOLDER`, run by the Dockerfiles while they build.

MODEL_FILE names the GGUF file; the first part of a split model stands for all. It comes from Hugging Face if
MODEL_REPO is set (at MODEL_REVISION, a branch, tag or commit), else from LOCAL_FOLDER. It must hash to MODEL_SHA256,
or, where that is empty, to what the repository says. Nothing set: nothing done. There is no way in for a token,
because build arguments stay readable in the image: download a gated model first and bake the file.
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
    """Raises SystemExit saying what to change if there is no such file, or it is not the one that was named."""
    repo, file = environ.get("MODEL_REPO", ""), environ.get("MODEL_FILE", "")
    if not file:
        if repo:
            raise SystemExit(f"MODEL_REPO is {repo!r}: MODEL_FILE must name the GGUF file in it.")
        return
    given = [digest for digest in environ.get("MODEL_SHA256", "").lower().split(",") if digest]
    files = parts(file)
    if given and len(given) != len(files):
        raise SystemExit(f"MODEL_SHA256 must hold {len(files)} digests, one for each of {', '.join(files)}.")
    for number, name in enumerate(files):
        if repo:
            path, expected = download(repo, name, environ.get("MODEL_REVISION") or "main", target)
        else:
            path, expected = copy(local, name, target), None
        check(path, given[number] if given else expected)
        print(f"baked {path} ({path.stat().st_size} bytes)")
    shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's notes about the download


def parts(file: str) -> list[str]:
    """Every file of a split model, given its first; else the file itself."""
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
    """The file, and the SHA-256 that the repository has for it (only files in large-file storage have one)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        meta = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        path = hf_hub_download(repo, name, revision=meta.commit_hash or revision, local_dir=target)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise SystemExit(f"{name!r} cannot be had from {repo!r} at {revision!r}: {error}") from error
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
            f"{path.name} hashes to {digest}, not to {expected}: set MODEL_SHA256 right, or MODEL_REVISION."
        )


if __name__ == "__main__":
    bake(Path(sys.argv[1]), Path(sys.argv[2]), os.environ)
