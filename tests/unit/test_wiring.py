"""The composition root: which sources the settings mean."""

from pathlib import Path

import pytest

from adapters.wiring import build, sources
from core.settings import Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), ["huggingface", "s3"]),
        (Settings(s3_bucket="models"), ["s3", "huggingface"]),
        (Settings(model_path="s3://bucket/m.gguf"), ["s3", "huggingface"]),
        (Settings(model_path="hf://org/repo/m.gguf"), ["huggingface", "s3"]),
    ],
)
def test_s3_is_asked_first_where_it_is_meant(settings: Settings, expected: list[str]) -> None:
    """The mirror is nearer than the hub; without one the hub need not wait for it."""
    assert expected == [source.name for source in sources(settings)]


def test_building_touches_neither_network_nor_disk(tmp_path: Path) -> None:
    """The folder of models is made when something lands in it; the state is known without a load."""
    service = build(Settings(models_dir=tmp_path / "models", embedded_model="off"))

    assert (service.host.state().status, service.host.state().model) == ("unloaded", None)
    assert list(tmp_path.iterdir()) == []
