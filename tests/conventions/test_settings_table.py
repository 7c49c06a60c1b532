"""`docs/settings.md` and `.env.example` agree with `core.settings`."""

import re
from pathlib import Path

import pytest

from core.settings import Settings, SettingsError
from infra import settings_table

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_example_are_generated() -> None:
    """Both files equal the output of `python -m infra.settings_table`."""
    assert settings_table.env_example() == (ROOT / ".env.example").read_text()
    assert settings_table.page() == (ROOT / "docs/settings.md").read_text()


def test_the_uncommented_example_gives_the_defaults() -> None:
    """Every uncommented line of .env.example is a valid setting with its default."""
    lines = re.findall(r"^#([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert Settings() == Settings.from_env(dict(lines))


def test_a_variable_is_read_by_one_field() -> None:
    """No two fields read the same variable."""
    names = [entry.name for entries in settings_table.groups().values() for entry in entries]

    assert sorted(set(names)) == sorted(names)


def test_a_choice_is_documented_with_all_its_values() -> None:
    """The page lists the values that the parser accepts, and the description of each choice explains them."""
    page = settings_table.page()
    for entry in [entry for entries in settings_table.groups().values() for entry in entries]:
        values = re.findall(r"`([a-z_]+)`", entry.values) if entry.values.startswith("`") else []
        for value in values:
            Settings.from_env({entry.name: value})
        if values:
            with pytest.raises(SettingsError, match=f"{entry.name} must be"):
                Settings.from_env({entry.name: "neither"})
            assert entry.values in page


def test_a_description_is_a_sentence() -> None:
    """Each description begins with a capital or a value and ends with a full stop."""
    for entry in [entry for entries in settings_table.groups().values() for entry in entries]:
        assert re.fullmatch(r"[A-Z0-9`].*\.", entry.doc), entry.name
