"""What a file may be: one noun, short, without tricks of the workplace it was written in."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "handlers", "adapters", "infra")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "managers", "shared", "types"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_noun_and_at_most_500_lines(path: Path) -> None:
    """A vague name or a long file usually holds more than one noun. Blank lines do not count."""
    assert path.stem not in VAGUE
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    """Every module with code in it begins with a docstring."""
    text = path.read_text().lstrip()

    assert not text or text.startswith('"""')


def test_no_file_is_tracked_that_must_not_be() -> None:
    """No model, environment, secret or cache is in the repository."""
    try:
        git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")

    unwanted = [
        name
        for name in git.stdout.split()
        if name.endswith((".gguf", ".pyc", ".so")) or name == ".env" or name.startswith((".venv/", "models/"))
    ]
    assert unwanted == []
