"""What clients without an admin key learn about the server's disk: names of models, and no paths."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.downloads import Downloads
from core.host import Host
from core.loader import load_llama
from core.service import Service
from core.settings import Settings, keys
from core.store.store import Store
from core.timeline import Timeline
from handlers.dispatch import dispatch
from handlers.http import Request
from tests import gguf_files as files

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
EXTRACT = {"text": "hi", "schema": {"type": "object", "properties": {}}}


@dataclass(frozen=True)
class Broken:
    """A MODEL_PATH, below the test's folder, and what is wrong with it."""

    path: str
    prepare: Callable[[Path], object] = lambda path: None
    after_start: Callable[[Path], object] = lambda path: None
    sha256: tuple[str, ...] = ()


def directory(path: Path) -> None:
    path.mkdir()


def missing_part(path: Path) -> None:
    name = "big-00001-of-00002.gguf"
    path.write_bytes(files.split_model("big", 2)[name])


def broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.gguf")


BROKEN = {
    "missing": Broken("models/a.gguf"),
    "missing, outside MODELS_DIR": Broken("elsewhere/a.gguf"),
    "not a name of a model": Broken("models/a.bin", lambda path: path.write_bytes(b"junk")),
    "control characters": Broken("models/a\x01.gguf"),
    "not a GGUF": Broken("models/a.gguf", lambda path: path.write_bytes(b"junk")),
    "truncated": Broken("models/a.gguf", lambda path: path.write_bytes(files.tiny_model()[:-100])),
    "without tensors": Broken("models/a.gguf", lambda path: path.write_bytes(files.gguf(files.llama_metadata(), []))),
    "a folder": Broken("models/a.gguf", directory),
    "a broken link": Broken("models/a.gguf", broken_link),
    "a part is missing": Broken("models/big-00001-of-00002.gguf", missing_part),
    "not the pinned one": Broken(
        "models/a.gguf", lambda path: path.write_bytes(files.tiny_model()), sha256=("0" * 64,)
    ),
    "gone since": Broken("models/a.gguf", lambda path: path.write_bytes(files.tiny_model()), Path.unlink),
    "damaged since": Broken(
        "models/a.gguf", lambda path: path.write_bytes(files.tiny_model()), lambda path: path.write_bytes(b"junk")
    ),
    "a form that does not exist": Broken("models/file://a.gguf"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("key", ["use", None])
def test_no_answer_has_a_path_of_the_server(
    case: str, key: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with MODEL_PATH. A client with a key learns the model's name, the log has the whole path."""
    caplog.set_level(logging.INFO)
    broken = BROKEN[case]
    models = tmp_path / "models"
    for folder in (models, tmp_path / "elsewhere"):
        folder.mkdir()
    path = tmp_path / broken.path
    broken.prepare(path)
    settings = Settings(
        models_dir=models,
        model_path=str(path),
        model_sha256=broken.sha256,
        embedded_model="off",
        api_keys=keys("use") if key else frozenset(),
        admin_api_keys=keys("boss"),
    )
    store = Store(models, allowed=(path,))
    service = Service(settings, store, Host(settings, store, Timeline(), load_llama), Timeline(), Downloads(store))
    service.host.start(load=False)
    broken.after_start(path)

    async def ask(method: str, target: str, body: object = None) -> tuple[int, str]:
        headers = {"host": "localhost", "content-type": "application/json", **({"x-api-key": key} if key else {})}
        name, _, query = target.partition("?")
        response = await dispatch(
            service,
            Request(
                method=method,
                path=name,
                id="r",
                headers=headers,
                body=b"" if body is None else json.dumps(body).encode(),
                query=dict([query.split("=")]) if query else {},
                client="127.0.0.1",
            ),
        )
        try:
            assert isinstance(response.body, bytes)
            return response.status, response.body.decode()
        finally:
            await response.aclose()

    async def main() -> list[tuple[int, str]]:
        answers = [await ask("GET", target) for target in ("/health", "/models", "/v1/models")]
        answers += [await ask("POST", "/v1/chat/completions", CHAT), await ask("POST", "/v1/extract", EXTRACT)]
        answers += [await ask("POST", "/v1/chat/completions", {**CHAT, "model": "other"})]
        answers += [await ask("POST", "/v1/chat/completions", {**CHAT, "stream": True, "model": "a"})]
        answers += [await ask("GET", "/health?wait=5"), await ask("GET", "/models"), await ask("GET", "/v1/models/b")]
        answers += [await ask("POST", "/load", {"reference": "a.gguf"}), await ask("POST", "/reload", {})]
        await service.host.close(1)
        return answers

    answers = asyncio.run(main())
    assert 503 in {status for status, _ in answers}
    assert [text for _, text in answers if str(tmp_path) in text] == []
    assert repr(str(path))[1:-1] in caplog.text
