"""Health, models, load and reload with a fake host and store."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

import core.chat
import core.extract
import core.health
import core.load
import core.models
import core.reload
from core.errors import ApiError, ModelUnavailable
from core.loader import Loading
from core.settings import keys
from core.store.directory import LocalModel
from core.store.reference import S3, HuggingFace
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import FakeHost, FakeService, FakeStore, ScriptedEngine, fake_service

STREAMED_LOAD = Request(
    "POST",
    "/load",
    "id",
    {"content-type": "application/json"},
    body=b'{"repo_id": "org/repo", "filename": "a.gguf", "stream": true}',
    client="127.0.0.1",
)


def call(fake: FakeService, method: str, path: str, body: Any = None, **request: Any) -> tuple[int, Any]:
    """Send one request from this machine through dispatch."""
    path, _, query = path.partition("?")
    headers = {"content-type": "application/json", **request.pop("headers", {})}
    sent = Request(
        method,
        path,
        "id",
        headers,
        query=dict(pair.split("=") for pair in query.split("&") if pair),
        body=b"" if body is None else json.dumps(body).encode(),
        client="127.0.0.1",
        **request,
    )
    answer = asyncio.run(dispatch(fake.service, sent))
    assert isinstance(answer.body, bytes)
    return answer.status, json.loads(answer.body)


def test_health_has_the_state_and_the_engines_counters() -> None:
    """When ready, it has the model, the counters and no error."""
    _, health = call(fake_service(), "GET", "/health")

    assert tuple(health[name] for name in ("status", "model", "loading", "error")) == ("ready", "fake-1b", None, None)
    assert health["engine"]["sequences"] == {"running": 0, "total": 4}
    assert "chat/completions" in health["hint"]


@pytest.mark.parametrize(
    ("status", "loading", "error", "hint"),
    [
        ("unloaded", None, None, "Set MODEL_PATH"),
        ("unloaded", None, "MODEL_PATH is not there.", "Fix the problem in `error`"),
        ("available", None, None, "first request loads"),
        ("available", Loading("download", "m", 25, 100), None, "wait=30"),
        ("ready", Loading("swap", "m"), None, "chat/completions"),
    ],
)
def test_each_state_has_a_hint(status: str, loading: Loading | None, error: str | None, hint: str) -> None:
    """Loading and error are fields next to the state."""
    fake = fake_service(host=FakeHost(None if status == "unloaded" else ScriptedEngine(), status=status))
    fake.host.loading, fake.host.error = loading, error
    _, health = call(fake, "GET", "/health")

    assert (status, error) == (health["status"], health["error"])
    assert hint in health["hint"]
    assert (health["loading"] or {}).get("percent") == (loading.percent if loading else None)


def test_health_with_wait_loads_the_model() -> None:
    """?wait answers when the model is ready; /health alone never loads a model."""
    fake = fake_service(host=FakeHost(ScriptedEngine(), status="available"))

    assert call(fake, "GET", "/health")[1]["status"] == "available"
    assert not fake.host.started
    assert call(fake, "GET", "/health?wait=5")[1]["status"] == "ready"


def test_health_without_a_key_shows_only_the_state() -> None:
    """If API keys are set, it shows neither error nor counters and cannot start a load."""
    fake = fake_service(host=FakeHost(ScriptedEngine(), status="available"), api_keys=keys("use"))
    fake.host.error = "/srv/secret/path.gguf is not a GGUF file."

    status, health = call(fake, "GET", "/health")
    assert (200, {"status", "model", "hint"}) == (status, set(health))
    assert "secret" not in json.dumps(health)
    assert call(fake, "GET", "/health?wait=5")[0] == 401
    assert not fake.host.started
    assert "error" in call(fake, "GET", "/health", headers={"x-api-key": "use"})[1]


def test_models_has_the_active_model_those_on_disk_and_boot_info(tmp_path: Path) -> None:
    """It also has OpenAI's list, for clients whose base_url lacks /v1."""
    model = tmp_path / "sub" / "m.gguf"
    fake = fake_service(store=FakeStore((LocalModel("sub/m.gguf", model, 7),)), n_ctx=512)
    with fake.service.timeline.phase("load"):
        pass
    _, models = call(fake, "GET", "/models")

    assert {"object", "data", "active", "available", "hint", "boot_info"} == set(models)
    active = models["active"]
    assert (active["path"], active["basename"], active["exists"]) == ("/models/fake-1b.gguf", "fake-1b.gguf", False)
    assert (active["loaded"], active["state"]) == (True, "ready")
    assert tuple(models["active"]["config"][name] for name in ("n_ctx", "model_path")) == (512, "/models/fake-1b.gguf")
    assert models["active"]["model"]["chat_template"].startswith("chatml")
    assert [{"name": "sub/m.gguf", "path": str(model), "size_bytes": 7}] == models["available"]
    phases = models["boot_info"].pop("phases")
    assert models["boot_info"] == {
        "chosen_by": "embedded",
        "reason": "nothing is configured",
        "reference": "/models/fake-1b.gguf",
        "path": "/models/fake-1b.gguf",
    }
    assert "load" in phases


def test_only_administrators_see_paths(tmp_path: Path) -> None:
    """Users need only names; paths reveal how the machine is set up."""
    store = FakeStore((LocalModel("b.gguf", tmp_path / "b.gguf", 7),))
    fake = fake_service(store=store, api_keys=keys("use"), admin_api_keys=keys("admin"))
    _, for_user = call(fake, "GET", "/models", headers={"x-api-key": "use"})
    _, for_admin = call(fake, "GET", "/models", headers={"x-api-key": "admin"})

    assert "/models/fake-1b.gguf" not in json.dumps(for_user)
    assert str(tmp_path) not in json.dumps(for_user)
    assert (for_user["active"]["basename"], for_user["available"]) == (
        "fake-1b.gguf",
        [{"name": "b.gguf", "size_bytes": 7}],
    )
    assert for_admin["available"][0]["path"] == str(tmp_path / "b.gguf")
    assert for_admin["active"]["path"] == for_admin["boot_info"]["path"] == "/models/fake-1b.gguf"


def test_models_of_an_empty_server() -> None:
    """Without a model there is no path, and the state is unloaded."""
    fake = fake_service(host=FakeHost())
    _, models = call(fake, "GET", "/models")

    assert (
        models["active"]["path"],
        models["active"]["exists"],
        models["active"]["loaded"],
        models["active"]["state"],
        models["data"],
    ) == (None, False, False, "unloaded", [])


def test_v1_models_lists_the_model_and_its_aliases() -> None:
    """Clients may use each name; * is not listed."""
    fake = fake_service(model_aliases=("gpt-4o-mini", "*", "org/model"))
    _, listed = call(fake, "GET", "/v1/models")

    assert [entry["id"] for entry in listed["data"]] == ["fake-1b", "gpt-4o-mini", "org/model"]
    assert {"id", "object", "created", "owned_by"} == set(listed["data"][0])
    assert listed["data"][2] == call(fake, "GET", "/v1/models/org/model")[1]


def test_an_unknown_model_is_a_404() -> None:
    """The message lists the served model. There is no fallback."""
    status, answer = call(fake_service(), "GET", "/v1/models/gpt-5")

    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "gpt-5" in answer["error"]["message"]
    assert "fake-1b" in answer["error"]["message"]


def test_load_fetches_and_does_not_switch() -> None:
    """The answer has the file's path and size and a hint how to serve it."""
    fake = fake_service()
    status, answer = call(fake, "POST", "/load", {"repo_id": "org/repo", "filename": "sub/a.gguf", "sha256": "AB" * 32})

    assert [(HuggingFace("org/repo", "sub/a.gguf", "main"), "ab" * 32)] == fake.store.fetches
    assert (
        status,
        *(answer[name] for name in ("status", "repo_id", "filename", "path", "size_bytes")),
    ) == (200, "downloaded", "org/repo", "sub/a.gguf", "/models/a.gguf", 1000)
    assert '"model_path": "/models/a.gguf"' in answer["hint"]
    assert fake.host.swaps == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"reference": "hf://org/repo/a.gguf@v1"}, HuggingFace("org/repo", "a.gguf", "v1")),
        ({"reference": "s3://bucket/key/a.gguf"}, S3("bucket", "key/a.gguf")),
        ({"repo_id": "org/repo", "filename": "a.gguf", "revision": "v1"}, HuggingFace("org/repo", "a.gguf", "v1")),
    ],
)
def test_load_takes_references(body: dict[str, str], expected: object) -> None:
    """A reference or its parts name the model."""
    fake = fake_service()

    assert call(fake, "POST", "/load", body)[0] == 200
    assert expected == fake.store.fetches[0][0]


def test_a_load_that_fails_at_once_is_a_503() -> None:
    """Before the first byte the error has its own status, also with `stream`."""
    fake = fake_service()
    fake.store.fetch_error = ModelUnavailable("The disk is full: 5 GB are needed, 1 GB is free.")
    model = {"repo_id": "org/repo", "filename": "a.gguf"}

    for body in (model, {**model, "stream": True}):
        status, answer = call(fake, "POST", "/load", body)
        assert (status, answer["error"]["code"]) == (503, "model_unavailable")
        assert "disk is full" in answer["error"]["message"]


def test_a_load_that_fails_late_is_an_error_event() -> None:
    """After the first byte the error is an event, followed by [DONE]."""
    fake = fake_service()
    answered = threading.Event()

    def fetch(progress: Any, cancelled: Any) -> None:
        progress(1, 100)
        assert answered.wait(10)

    fake.store.on_fetch = fetch
    fake.store.fetch_error = ModelUnavailable("The connection broke.")

    async def read() -> bytes:
        answer = await dispatch(fake.service, STREAMED_LOAD)
        answered.set()
        assert not isinstance(answer.body, bytes)
        try:
            return b"".join([chunk async for chunk in answer.body])
        finally:
            await answer.aclose()

    frames = asyncio.run(read()).decode().strip().split("\n\n")
    assert "The connection broke." in json.loads(frames[-2].removeprefix("data: "))["error"]["message"]
    assert frames[-1] == "data: [DONE]"


def test_closing_a_streamed_load_stops_the_download() -> None:
    """The download thread is cancelled and ends."""
    fake = fake_service()
    ended = threading.Event()

    def fetch(progress: Any, cancelled: Any) -> None:
        import time

        progress(1, 100)
        while not cancelled():
            time.sleep(0.01)
        ended.set()

    fake.store.on_fetch = fetch

    async def hang_up() -> None:
        answer = await dispatch(fake.service, STREAMED_LOAD)
        assert not isinstance(answer.body, bytes)
        await anext(aiter(answer.body))
        await answer.aclose()
        await answer.aclose()

    asyncio.run(hang_up())
    assert ended.wait(10)


def test_reload_swaps_to_a_local_model(tmp_path: Path) -> None:
    """Fields of the request override the settings."""
    fake = fake_service(store=FakeStore((LocalModel("b.gguf", tmp_path / "b.gguf", 7),)), n_batch=128)
    status, answer = call(fake, "POST", "/reload", {"model_path": "b.gguf", "n_ctx": 1024, "verbose": None})

    assert (status, answer["status"], answer["model"]) == (200, "ready", "b")
    [(path, config)] = fake.host.swaps
    assert (str(tmp_path / "b.gguf"), 1024, 128) == (path, config.n_ctx, config.n_batch)
    assert answer["active"]["config"]["n_ctx"] == 1024


def test_reload_without_a_path_loads_the_same_model() -> None:
    """The body may be empty."""
    fake = fake_service()

    assert call(fake, "POST", "/reload")[0] == 200
    [(path, config)] = fake.host.swaps
    assert (path, config.n_ctx) == (None, 4096)


def test_reload_without_any_model_is_a_400() -> None:
    """No model is served or configured, so model_path is required."""
    fake = fake_service(host=FakeHost())
    status, answer = call(fake, "POST", "/reload", {})

    assert (status, answer["error"]["param"]) == (400, "model_path")


def test_reload_of_a_remote_model_is_refused() -> None:
    """The message says to /load it first."""
    status, answer = call(fake_service(), "POST", "/reload", {"model_path": "hf://org/repo/a.gguf"})

    assert status == 400
    assert "/load" in answer["error"]["message"]


def test_a_failed_reload_returns_the_hosts_error() -> None:
    """The host's own tests check that the old model stays."""
    fake = fake_service()
    fake.host.swap_error = ModelUnavailable("Not enough memory for 'b'.")
    status, answer = call(fake, "POST", "/reload", {})

    assert (status, answer["error"]["message"]) == (503, "Not enough memory for 'b'.")


def test_an_internal_error_hides_its_message() -> None:
    """The message of a plain ApiError is for the log only."""
    fake = fake_service()
    fake.host.swap_error = ApiError("llama_decode returned -3 at 0xdeadbeef")
    status, answer = call(fake, "POST", "/reload", {})

    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "0xdeadbeef" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "operation",
    [
        core.health.health,
        core.models.models,
        core.load.load,
        core.reload.reload,
        core.chat.complete,
        core.extract.complete,
    ],
    ids=lambda operation: operation.__module__,
)
def test_every_operation_returns_a_struct_with_a_json_schema(operation: Callable[..., Any]) -> None:
    """An OpenAPI document can be generated from the return types."""
    result = get_type_hints(operation)["return"]

    assert issubclass(result, msgspec.Struct)
    assert msgspec.json.schema(result)["$defs"][result.__name__]["type"] == "object"
