"""`bake_model` copies the named model into an image or stops the build."""

import hashlib
from pathlib import Path

import pytest

from infra.docker.bake_model import bake, parts

MODEL = b"GGUF" + bytes(100)
DIGEST = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "baked"
    folder.mkdir()
    (folder / "small.gguf").write_bytes(MODEL)
    return folder


def test_a_local_file_is_baked_under_its_name(local: Path, tmp_path: Path) -> None:
    """Without MODEL_REPO, MODEL_FILE is taken from the folder baked/."""
    bake(local, tmp_path / "model", {"MODEL_FILE": "small.gguf", "MODEL_SHA256": DIGEST.upper()})

    assert (tmp_path / "model" / "small.gguf").read_bytes() == MODEL


def test_without_a_name_nothing_is_baked(local: Path, tmp_path: Path) -> None:
    """A file in baked/ that MODEL_FILE does not name is not copied."""
    bake(local, tmp_path / "model", {"MODEL_FILE": "", "MODEL_REPO": "", "MODEL_SHA256": ""})

    assert not (tmp_path / "model").exists()


def test_every_part_of_a_split_model_is_baked(local: Path, tmp_path: Path) -> None:
    """MODEL_FILE names the first part."""
    for number in (1, 2):
        (local / f"big-{number:05}-of-00002.gguf").write_bytes(MODEL)

    bake(local, tmp_path / "model", {"MODEL_FILE": "big-00001-of-00002.gguf"})

    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == parts("big-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MODEL_FILE": "small.gguf", "MODEL_SHA256": "0" * 64}, f"has the SHA-256 {DIGEST}"),
        ({"MODEL_FILE": "other.gguf"}, "There is no 'other.gguf' in the folder baked/"),
        ({"MODEL_FILE": "text.gguf"}, "not a GGUF file"),
        ({"MODEL_REPO": "org/repo"}, "MODEL_FILE must name"),
        ({"MODEL_FILE": "big-00001-of-00002.gguf", "MODEL_SHA256": DIGEST}, "MODEL_SHA256 must hold 2 digests"),
    ],
)
def test_a_missing_or_wrong_file_stops_the_build(
    local: Path, tmp_path: Path, environ: dict[str, str], message: str
) -> None:
    """The message says what is wrong and what to change."""
    (local / "text.gguf").write_text("<html>not found</html>")

    with pytest.raises(SystemExit, match=message):
        bake(local, tmp_path / "model", environ)
