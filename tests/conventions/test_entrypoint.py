"""infra/docker/entrypoint.sh: the server never runs as root, and the folders of models are its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

INFRA = Path(__file__).parents[2] / "infra" / "docker"
[ENTRYPOINT] = INFRA.rglob("entrypoint.sh")

as_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="it changes users as root only, by setpriv"
)


def run(folder: Path, *command: str, **options: object) -> list[str]:
    """What the command said, started through the script with both folders in `folder`."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/root",
        "MODELS_DIR": str(folder / "models"),
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run(
        ["/bin/sh", str(ENTRYPOINT), *command],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
        **options,  # type: ignore[call-overload]
    )
    return list(done.stdout.split())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users reach, too, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@as_root
def test_a_folder_of_roots_is_given_to_user_1000(folder: Path) -> None:
    """As the container engine makes it on the first run; both folders, and the server can write to them."""
    probe = 'id -u; id -g; touch "$MODELS_DIR/a" "$HF_HOME/b"; echo $HOME; grep NoNewPrivs /proc/self/status'
    said = run(folder, "sh", "-c", probe)

    assert said == ["1000", "1000", "/tmp", "NoNewPrivs:", "1"]
    assert [(folder / name).stat().st_uid for name in ("models", "hf", "models/a", "hf/b")] == [1000] * 4


@as_root
def test_a_folder_of_another_user_keeps_its_owner(folder: Path) -> None:
    """The server runs as that user, so that the host's user and it can both write."""
    (folder / "models").mkdir()
    os.chown(folder / "models", 4321, 8765)
    said = run(folder, "sh", "-c", 'id -u; id -g; id -G; touch "$MODELS_DIR/a"')

    assert said == ["4321", "8765", "8765"]
    assert (folder / "models" / "a").stat().st_gid == 8765


@as_root
def test_a_folder_that_cannot_be_given_away_is_no_reason_to_run_as_root(folder: Path) -> None:
    """A read-only mount refuses chown; the server then runs as user 1000 and reads."""
    commands = folder / "bin"
    commands.mkdir()
    refusing = commands / "chown"
    refusing.write_text("#!/bin/sh\necho 'Read-only file system' >&2\nexit 1\n")
    refusing.chmod(0o755)
    environ = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "MODELS_DIR": str(folder / "m"),
        "HF_HOME": str(folder / "h"),
    }
    done = subprocess.run(
        ["/bin/sh", str(ENTRYPOINT), "id", "-u"], env=environ, capture_output=True, text=True, check=True, timeout=30
    )

    assert (done.stdout, done.stderr) == ("1000\n", "")


@as_root
def test_started_as_a_user_it_changes_nothing(folder: Path) -> None:
    """Where the container has a user already, the command simply runs."""
    said = run(folder, "sh", "-c", "id -u; echo $HOME", user=1234)

    assert said == ["1234", "/root"]
    assert list(folder.iterdir()) == []
