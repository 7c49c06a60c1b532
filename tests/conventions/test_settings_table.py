"""Settings, `.env.example` and the README's table are one thing."""

import re
from pathlib import Path

from core.settings import Settings
from infra import settings_table

ROOT = Path(__file__).parents[2]


def test_the_readme_and_the_example_are_made_from_settings() -> None:
    """Nobody edits a table by hand and forgets the other two."""
    assert settings_table.env_example() == (ROOT / ".env.example").read_text()
    assert settings_table.readme((ROOT / "README.md").read_text()) == (ROOT / "README.md").read_text()


def test_the_example_read_as_it_stands_gives_the_defaults() -> None:
    """Every line of .env.example, uncommented, is a valid setting and the default."""
    lines = re.findall(r"^#([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert Settings() == Settings.from_env(dict(lines))


def test_a_variable_is_named_once() -> None:
    """No two fields read the same variable."""
    names = [one["name"] for _, settings in settings_table.groups() for one in settings]

    assert sorted(set(names)) == sorted(names)
