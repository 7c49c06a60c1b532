"""infra/docker/entrypoint.sh never runs the server as root and makes the model folders writable for it."""

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
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="changing users needs root and setpriv"
)


def run(folder: Path, *command: str, **options: object) -> list[str]:
    """Run a command through the script, with both model folders in `folder`, and return the words it prints."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/root",
        "MODELS_DIR": str(folder / "models"),
        "HF_HOME": str(folder / "hf"),
    }
    process = subprocess.run(
        ["/bin/sh", str(ENTRYPOINT), *command],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
        **options,  # type: ignore[call-overload]
    )
    return list(process.stdout.split())


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that other users can reach. They cannot reach pytest's own folders."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@as_root
def test_folders_of_root_are_given_to_user_1000(folder: Path) -> None:
    """The container engine creates them as root on the first run. The server can then write to them."""
    probe = 'id -u; id -g; touch "$MODELS_DIR/a" "$HF_HOME/b"; echo $HOME; grep NoNewPrivs /proc/self/status'
    printed = run(folder, "sh", "-c", probe)

    assert printed == ["1000", "1000", "/tmp", "NoNewPrivs:", "1"]
    assert [(folder / name).stat().st_uid for name in ("models", "hf", "models/a", "hf/b")] == [1000] * 4


@as_root
def test_a_folder_of_another_user_keeps_its_owner(folder: Path) -> None:
    """The server runs as that user, so the host's user and the server can both write."""
    (folder / "models").mkdir()
    os.chown(folder / "models", 4321, 8765)
    printed = run(folder, "sh", "-c", 'id -u; id -g; id -G; touch "$MODELS_DIR/a"')

    assert printed == ["4321", "8765", "8765"]
    assert (folder / "models" / "a").stat().st_gid == 8765


@as_root
def test_a_failed_chown_does_not_keep_the_server_root(folder: Path) -> None:
    """A read-only mount refuses chown. The server then runs as user 1000 and reads."""
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
    process = subprocess.run(
        ["/bin/sh", str(ENTRYPOINT), "id", "-u"], env=environ, capture_output=True, text=True, check=True, timeout=30
    )

    assert (process.stdout, process.stderr) == ("1000\n", "")


@as_root
def test_without_root_nothing_changes(folder: Path) -> None:
    """If the container runs as another user, the command simply runs."""
    printed = run(folder, "sh", "-c", "id -u; echo $HOME", user=1234)

    assert printed == ["1234", "/root"]
    assert list(folder.iterdir()) == []
