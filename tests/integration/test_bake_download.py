"""`bake_model` downloads a model from a Hugging Face double."""

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


def test_a_model_is_downloaded_and_checked(tmp_path: Path) -> None:
    """The target folder holds the file, checked against the repository's digest, and nothing else."""
    process = baked(tmp_path, "small.gguf")

    assert process.returncode == 0, process.stderr
    assert (tmp_path / "model" / "small.gguf").read_bytes() == MODEL
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["small.gguf"]


@pytest.mark.parametrize(
    ("file", "faults", "message"),
    [
        ("none.gguf", [], "'none.gguf' could not be downloaded from 'org/repo'"),
        ("small.gguf", [Fault(flip=True, times=9)], "not a GGUF file"),
        ("small.gguf", [Fault(on="HEAD", etag="0" * 64, times=9)], "has the SHA-256"),
    ],
)
def test_a_wrong_or_missing_file_stops_the_build(tmp_path: Path, file: str, faults: list[Fault], message: str) -> None:
    """Without MODEL_SHA256, the file must match the repository's digest."""
    process = baked(tmp_path, file, *faults)

    assert process.returncode == 1
    assert message in process.stderr
