"""Selection: which model the settings choose, and what the start does with it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from core.host import Host
from core.selection import Selection, select
from core.settings import Settings
from core.store.embedded import embedded_model
from core.store.reference import File, HuggingFace
from core.store.source import Partial, Progress, RemoteFile, RemoteModel
from core.store.store import Store
from core.timeline import Timeline
from tests.fakes import ScriptedEngine
from tests.gguf_files import tiny_model, write

CONTENT = tiny_model()
AUTO = {"auto_repo_id": "org/repo", "auto_filename": "auto.gguf"}
REFERENCE = HuggingFace("org/repo", "auto.gguf")


class Hub:
    """A source of one model, which waits for `may_deliver`."""

    name, authority = "huggingface", True

    def __init__(self) -> None:
        self.delivered: list[str] = []
        self.may_deliver = threading.Event()
        self.may_deliver.set()

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        digest = hashlib.sha256(CONTENT).hexdigest()
        return RemoteModel(self.name, reference, (RemoteFile(reference.filename, len(CONTENT), digest),))

    def download(
        self, _remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        assert self.may_deliver.wait(10)
        os.pwrite(partial.fd, CONTENT, 0)
        partial.landed(len(CONTENT))
        self.delivered.append(file.path)
        return False


def selection_of(folder: Path, source: Hub | None = None, **settings: Any) -> Selection:
    store = Store(folder, (source or Hub(),))  # type: ignore[arg-type]
    return select(Settings(models_dir=folder, **settings), store)


def test_auto_names_a_model_to_download(tmp_path: Path) -> None:
    """AUTO_REPO_ID and AUTO_FILENAME make a reference. Selecting it sends no request."""
    selection = selection_of(tmp_path, **AUTO)

    assert (selection.chosen_by, selection.reference, selection.is_local, selection.error) == (
        "AUTO_REPO_ID",
        REFERENCE,
        False,
        None,
    )
    assert selection.name == "auto"


def test_a_downloaded_auto_model_is_selected_as_local(tmp_path: Path) -> None:
    """This also applies with AUTO_IF_MISSING=false."""
    Store(tmp_path, (Hub(),)).fetch(REFERENCE)  # type: ignore[arg-type]
    selection = selection_of(tmp_path, auto_if_missing=False, **AUTO)

    assert selection.report() == {
        "chosen_by": "AUTO_REPO_ID",
        "reason": "it was downloaded before",
        "reference": "hf://org/repo/auto.gguf@main",
        "path": str(tmp_path / "auto.gguf"),
    }
    assert selection.is_local


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"auto_repo_id": "org/repo"}, "AUTO_FILENAME is not set"),
        ({"auto_filename": "auto.gguf"}, "AUTO_REPO_ID is not set"),
        ({"auto_repo_id": "repo", "auto_filename": "auto.gguf"}, "AUTO_REPO_ID/AUTO_FILENAME: "),
        ({"auto_repo_id": "org/repo", "auto_filename": "../auto.gguf"}, "AUTO_REPO_ID/AUTO_FILENAME: "),
        ({**AUTO, "auto_if_missing": False}, "auto.gguf is not in MODELS_DIR, and AUTO_IF_MISSING=false"),
    ],
)
def test_an_unusable_auto_is_an_error(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """It never falls back to the embedded model."""
    selection = selection_of(tmp_path, **settings)

    assert (selection.chosen_by, selection.reference, selection.is_local) == ("AUTO_REPO_ID", None, False)
    assert (selection.error or "").startswith(words)


def test_an_existing_model_path_takes_precedence_over_auto(tmp_path: Path) -> None:
    """AUTO_* applies if MODEL_PATH is missing."""
    path = write(tmp_path, "mine.gguf", CONTENT)
    existing = selection_of(tmp_path, model_path=str(path), **AUTO)
    missing = selection_of(tmp_path, model_path=str(tmp_path / "missing.gguf"), **AUTO)

    assert (existing.chosen_by, existing.reference, existing.path) == ("MODEL_PATH", File(str(path)), str(path))
    assert (missing.chosen_by, missing.reference) == ("AUTO_REPO_ID", REFERENCE)


def test_a_missing_model_path_with_an_unusable_auto_names_the_file(tmp_path: Path) -> None:
    """MODEL_PATH is the variable to correct."""
    missing = str(tmp_path / "missing.gguf")
    selection = selection_of(tmp_path, model_path=missing, auto_repo_id="org/repo")

    assert (selection.chosen_by, selection.reference) == ("MODEL_PATH", None)
    assert "MODEL_PATH names 'missing.gguf', which does not exist" in (selection.error or "")


def test_the_default_is_the_embedded_model(tmp_path: Path) -> None:
    """With EMBEDDED_MODEL=off there is none."""
    embedded = selection_of(tmp_path)
    nothing = selection_of(tmp_path, embedded_model="off")

    assert (embedded.chosen_by, embedded.path, embedded.is_local) == ("embedded", str(embedded_model()), True)
    assert (nothing.chosen_by, nothing.reference, nothing.error) == ("nothing", None, None)


@pytest.mark.parametrize("preload", [False, True])
def test_the_start_downloads_auto_and_preloads_it_if_set(tmp_path: Path, preload: bool) -> None:
    """Without AUTO_PRELOAD the model is only downloaded; with it, it is also loaded."""
    source, loads = Hub(), []
    source.may_deliver.clear()

    def load(file: Any, config: Any, progress: Any) -> ScriptedEngine:
        loads.append(str(file.path))
        return ScriptedEngine()

    settings = Settings(models_dir=tmp_path, auto_preload=preload, model_target="disk", **AUTO)
    host = Host(settings, Store(tmp_path, (source,)), Timeline(), load)  # type: ignore[arg-type]

    async def main() -> None:
        assert (host.state().status, host.state().model) == ("unloaded", "auto")
        host.start()
        assert source.delivered == []
        source.may_deliver.set()
        while host.state().status == "unloaded" or host.state().loading is not None:
            await asyncio.sleep(0.005)
        assert source.delivered == ["auto.gguf"]
        assert host.state().status == ("ready" if preload else "available")
        assert loads == ([str(tmp_path / "auto.gguf")] if preload else [])
        assert host.boot["path"] == str(tmp_path / "auto.gguf")
        await host.close(1)

    asyncio.run(asyncio.wait_for(main(), 20))
