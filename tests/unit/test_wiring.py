"""The composition root: sources, settings and warnings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.wiring import build, sources
from core.engine import native
from core.errors import InvalidRequest
from core.host import config_of
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
def test_s3_comes_first_if_it_is_configured(settings: Settings, expected: list[str]) -> None:
    """The mirror is closer than the hub."""
    assert expected == [source.name for source in sources(settings)]


def test_building_touches_neither_network_nor_disk(tmp_path: Path) -> None:
    """MODELS_DIR is created with the first download, and the state is known without a load."""
    service = build(Settings(models_dir=tmp_path / "models", embedded_model="off"))

    assert (service.host.state().status, service.host.state().model) == ("unloaded", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, True)),
        ({"N_GPU_LAYERS": "7"}, (7, True)),
        ({"N_GPU_LAYERS": "-1"}, (-1, True)),
        ({"REPACK": "on"}, (0, True)),
        ({"REPACK": "off"}, (0, False)),
    ],
)
def test_settings_of_a_load_reach_llama_cpp(
    tiny_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    expected: tuple[int, bool],
) -> None:
    """N_GPU_LAYERS and REPACK become llama.cpp's model parameters."""
    bindings = native.bindings()
    load, requested = bindings.llama_model_load_from_file, []

    def spy(path: bytes, params: Any) -> Any:
        requested.append((params.n_gpu_layers, params.use_extra_bufts))
        return load(path, params)

    monkeypatch.setattr(bindings, "llama_model_load_from_file", spy)
    config = config_of(Settings.from_env(environ))
    tiny_engine("llama", n_gpu_layers=config.n_gpu_layers, repack=config.repack)

    assert requested == [expected]


@pytest.mark.parametrize(
    ("endpoint", "token", "warned"),
    [
        ("http://hub.example", "t", True),
        ("http://hub.example", None, False),
        ("https://hub.example", "t", False),
        ("http://localhost:8080", "t", False),
        ("http://[::1]:8080", "t", False),
    ],
)
def test_an_unencrypted_token_logs_a_warning(
    caplog: pytest.LogCaptureFixture, endpoint: str, token: str | None, warned: bool
) -> None:
    """Plain HTTP is accepted without a warning on this machine only."""
    sources(Settings(hf_endpoint=endpoint, hf_token=token))

    assert ("HF_TOKEN is sent unencrypted" in caplog.text) == warned


def test_an_embedding_model_has_a_host_of_its_own(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """It may be outside MODELS_DIR, and an encoder. Without the setting there is nothing: no store, no host."""
    assert build(Settings(models_dir=tmp_path)).embedder is None

    service = build(Settings(models_dir=tmp_path, embedded_model="off", embedding_model_path=str(tiny("bert"))))

    assert service.embedder is not None
    state = service.embedder.state()
    assert (state.status, state.model, state.error) == ("available", "bert", None)
    assert service.host.state().model is None
    with pytest.raises(InvalidRequest, match="outside MODELS_DIR"):
        service.store.locate(str(tiny("bert")))
