"""A model baked from Hugging Face, or something that speaks as it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_double import Fault, HubDouble, Repo

ROOT = Path(__file__).parents[2]
MODEL = b"GGUF" + os.urandom(100_000)


def baked(target: Path, file: str, *faults: Fault) -> "subprocess.CompletedProcess[str]":
    with HubDouble({"org/repo": Repo({"small.gguf": MODEL})}) as hub:
        hub.faults = list(faults)
        environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(target / "hf")}
        environ |= {"MODEL_REPO": "org/repo", "MODEL_FILE": file, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, str(ROOT / "infra/docker/bake_model.py"), "none", str(target / "model")]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_a_model_comes_from_the_hub_while_the_image_is_built(tmp_path: Path) -> None:
    """The file lies in the target folder, checked against the repository's digest, and nothing else does."""
    done = baked(tmp_path, "small.gguf")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "small.gguf").read_bytes() == MODEL
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["small.gguf"]


@pytest.mark.parametrize(
    ("file", "faults", "says"),
    [
        ("none.gguf", [], "'none.gguf' could not be downloaded from 'org/repo'"),
        ("small.gguf", [Fault(flip=True, times=9)], "not a GGUF file"),
        ("small.gguf", [Fault(on="HEAD", etag="0" * 64, times=9)], "has the SHA-256"),
    ],
)
def test_a_wrong_or_missing_file_stops_the_build(tmp_path: Path, file: str, faults: list[Fault], says: str) -> None:
    """Without a digest given, the repository's own is what the file must hash to."""
    done = baked(tmp_path, file, *faults)

    assert done.returncode == 1
    assert says in done.stderr
