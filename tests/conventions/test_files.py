"""Files are named by one noun, short, documented, and none is tracked by mistake."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "handlers", "adapters", "infra")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "managers", "shared", "types"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_noun_and_at_most_500_lines(path: Path) -> None:
    """A vague name or a long file usually means several nouns. Blank lines do not count."""
    assert path.stem not in VAGUE
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_a_docstring(path: Path) -> None:
    """Empty modules need none."""
    text = path.read_text().lstrip()

    assert not text or text.startswith('"""')


def test_no_unwanted_file_is_tracked() -> None:
    """The repository holds no model, environment, secret or cache."""
    try:
        git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")

    unwanted = [
        name
        for name in git.stdout.split()
        if name.endswith((".gguf", ".pyc", ".so"))
        or name == ".env"
        or name.startswith((".venv/", ".schemathesis/", "models/"))
    ]
    assert unwanted == []


def test_no_two_test_files_have_the_same_name() -> None:
    """The folders of tests are no packages, so pytest imports each file under its bare name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]

    assert sorted(set(names)) == sorted(names)
