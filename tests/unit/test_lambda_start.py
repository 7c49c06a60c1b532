"""The start on Lambda: defaults, checks and the load."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from adapters.aws_lambda import start
from adapters.aws_lambda.start import Start, read_settings, set_defaults
from core.downloads import Downloads
from core.service import Service
from core.settings import SettingsError, keys
from tests.fakes import FakeHost, FakeStore, ScriptedEngine

ROOT = Path(__file__).parents[2]


def test_default_folders_are_below_tmp() -> None:
    """This applies if HOME is not writable."""
    environ = {"HOME": "/nonexistent"}
    set_defaults(environ)

    assert environ == {"HOME": "/tmp", "HF_HOME": "/tmp/huggingface", "MODELS_DIR": "/tmp/models"}


def test_configured_folders_are_not_changed(tmp_path: Path) -> None:
    """Neither is a writable HOME."""
    environ = {"HOME": str(tmp_path), "HF_HOME": "/mnt/hf", "MODELS_DIR": "/mnt/models"}
    configured = dict(environ)
    set_defaults(environ)

    assert environ == configured


def model_path(environ: dict[str, str]) -> str | None:
    set_defaults(environ)
    return environ.get("MODEL_PATH")


def test_the_baked_model_is_the_default(tmp_path: Path) -> None:
    """The template sets MODEL_PATH to an empty string. A configured model takes precedence."""
    baked = {"HOME": str(tmp_path), "BAKED_MODEL": "/opt/model/a.gguf"}

    assert model_path({**baked, "MODEL_PATH": ""}) == "/opt/model/a.gguf"
    assert model_path({**baked, "MODEL_PATH": "hf://o/r/b.gguf"}) == "hf://o/r/b.gguf"
    assert model_path({**baked, "AUTO_REPO_ID": "o/r"}) is None
    assert model_path({"HOME": str(tmp_path), "BAKED_MODEL": ""}) is None  # SmolLM2's image holds a package instead


@pytest.mark.parametrize(
    ("variables", "level", "form"),
    [
        ({"AWS_LAMBDA_LOG_LEVEL": "WARN", "AWS_LAMBDA_LOG_FORMAT": "JSON"}, "warning", "json"),
        ({"AWS_LAMBDA_LOG_LEVEL": "FATAL", "AWS_LAMBDA_LOG_FORMAT": "Text"}, "error", "text"),
        ({"AWS_LAMBDA_LOG_LEVEL": "ERROR", "LOG_LEVEL": "debug", "LOG_FORMAT": "text"}, "debug", "text"),
        ({"AWS_LAMBDA_LOG_LEVEL": "LOUD", "AWS_LAMBDA_LOG_FORMAT": "XML"}, "info", "auto"),
    ],
)
def test_logging_config_sets_level_and_format(variables: dict[str, str], level: str, form: str) -> None:
    """LOG_LEVEL and LOG_FORMAT override the function's LoggingConfig."""
    environ = {"API_KEYS": "a", **variables}
    set_defaults(environ)
    settings = read_settings(environ)

    assert (settings.log_level, settings.log_format) == (level, form)


@pytest.mark.parametrize(
    "environ",
    [
        {"API_KEYS": "a"},
        {"API_KEYS_SECRET": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:slm"},
        {"IAM_AUTH": "true"},
    ],
)
def test_a_guarded_url_starts(environ: dict[str, str]) -> None:
    """API keys, a secret with keys or IAM guard it."""
    read_settings(environ)


@pytest.mark.parametrize("environ", [{}, {"ALLOW_ANONYMOUS": "true"}, {"ADMIN_API_KEYS": "a"}, {"IAM_AUTH": "false"}])
def test_an_open_url_stops_the_start(environ: dict[str, str]) -> None:
    """Admin keys alone and ALLOW_ANONYMOUS do not guard it."""
    with pytest.raises(SettingsError, match=r"API_KEYS or API_KEYS_SECRET must be set.*IAM_AUTH=true"):
        read_settings(environ)


@pytest.fixture
def wiring(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """Replace `adapters.wiring` by one that builds fakes."""
    host = FakeHost(ScriptedEngine())
    module = types.ModuleType("adapters.wiring")

    def build(settings: Any, timeline: Any, *, on_lambda: bool) -> Service:
        assert on_lambda
        store = FakeStore()
        return Service(settings, store, host, timeline, Downloads(store))  # type: ignore[arg-type]

    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adapters.wiring", module)
    return host


def test_the_start_begins_the_load(wiring: FakeHost) -> None:
    """It does so whatever AUTO_PRELOAD says."""
    service = Start({"API_KEYS": "a"}).service()

    assert wiring.load_argument
    assert service.settings.api_keys == keys("a")
    assert [phase.name for phase in service.timeline.phases()] == ["wiring"]


def test_weak_keys_are_logged(wiring: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    """The service is returned after the logs are configured, so the warning has their format. It repeats no key."""
    started = Start({"API_KEYS": "hunter2", "ADMIN_API_KEYS": "0123456789abcdef"})
    assert not caplog.records
    started.service()

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "API_KEYS contains a key shorter than 16 characters" in record.getMessage()
    assert "hunter2" not in caplog.text
    started.with_keys(frozenset())  # a restored snapshot reads the secret again
    assert len(caplog.records) == 1


def test_keys_of_the_secret_are_added(wiring: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count like those in API_KEYS and can be renewed."""
    from adapters.aws import secrets as secret

    monkeypatch.setattr(secret, "read_keys", lambda arn, environ: keys("from-secret"))
    environ = {"API_KEYS": "a", "API_KEYS_SECRET": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:slm"}
    started = Start(environ)

    assert started.service().settings.api_keys == keys("a,from-secret")
    assert started.with_keys(keys("renewed")).settings.api_keys == keys("a,renewed")
    assert started.with_keys(keys("renewed")).host is wiring


def test_a_secret_that_cannot_be_read_stops_the_start(wiring: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its keys the URL is not served."""
    from adapters.aws import secrets as secret

    def fail(arn: str, environ: Any) -> Any:
        raise SettingsError("API_KEYS_SECRET cannot be read: no answer.")

    monkeypatch.setattr(secret, "read_keys", fail)

    with pytest.raises(SettingsError, match="cannot be read"):
        Start({"API_KEYS_SECRET": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:slm"}).service()


def test_the_standard_handler_is_built_on_first_access(wiring: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapters.aws_lambda.handler` wraps the application in Mangum, with deadline and request id."""
    import asyncio

    import adapters.aws_lambda as package
    from adapters import logs
    from infra.emulator.event import from_buffered, to_event

    monkeypatch.setattr(start.os, "environ", {"API_KEYS": "secret", "HOME": "/tmp"})
    monkeypatch.setattr(logs, "configure", lambda settings: None)

    class Context:
        aws_request_id = "request-1"

        def get_remaining_time_in_millis(self) -> int:
            return 5000

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        handler = package.handler
        assert package.handler is handler
        event = to_event("GET", "/v1/models", headers=[("authorization", "Bearer secret")])
        status, headers, body = from_buffered(handler(event, Context()), b"")
    finally:
        package.__dict__.pop("handler", None)
        asyncio.set_event_loop(None)
        loop.close()

    assert status == 200
    assert b"fake-1b" in body
    assert dict(headers)["x-request-id"] == "request-1"
    with pytest.raises(AttributeError):
        package.other  # noqa: B018


def test_the_load_is_started_before_the_heavy_imports() -> None:
    """No event loop, web framework or HTTP library is imported before loading begins."""
    code = "import sys, adapters.aws_lambda.start; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert set() == set(process.stdout.split()) & {
        "asyncio",
        "starlette",
        "mangum",
        "msgspec",
        "http",
        "ssl",
        "botocore",
    }


def test_nothing_is_built_on_import() -> None:
    """Importing the package reads no settings and builds no handler."""
    code = (
        "import adapters.aws_lambda.runtime, adapters.aws_lambda.__main__;print('handler' in vars(adapters.aws_lambda))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert process.stdout.strip() == "False"
