"""Fixtures for every folder of tests: tiny models with random weights, and engines that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from core.engine.interface import EngineConfig
from core.engine.llama import Llama
from core.store.model_file import ModelFile

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the random seed, which `pytest -q` omits."""
    terminalreporter.write_line(f"random seed: {config.getoption('randomly_seed', None)}")


MakeModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Make a tiny model, e.g. `tiny("lfm2")`, of a kind in `tiny_models.KINDS`; once a session. Do not change it."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("tiny")

    def make(kind: str) -> Path:
        from tests import tiny_models  # imports gguf, which only these tests need

        if kind not in made:
            made[kind] = tiny_models.make(kind, folder)
        return made[kind]

    return make


@pytest.fixture
def tiny_engine(tiny: MakeModel) -> Iterator[Callable[..., Llama]]:
    """Load a tiny model, e.g. `tiny_engine("lfm2", n_ctx=256)`; it is closed when the test ends."""
    engines: list[Llama] = []

    def load(kind: str, **config: Any) -> Llama:
        path = tiny(kind)
        file = ModelFile(path.stem, path, path.stat().st_size, "file")
        config = {"n_ctx": 1024, "n_threads": 1, **config}
        engines.append(Llama(file, EngineConfig(**config)))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()
