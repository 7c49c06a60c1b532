"""The local server's start: what it refuses and what it prints."""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from adapters.local.__main__ import configured
from adapters.local.admin_key import admin_key
from adapters.local.terminal import ProgressLine, banner
from core.host import HostState
from core.loader import Loading
from core.settings import Settings, SettingsError, keys, weak_keys
from core.version import VERSION

ROOT = Path(__file__).parents[2]


def options(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"host": None, "port": None, "workers": 1, **values})


def test_options_override_the_environment() -> None:
    """--host and --port are validated like HOST and PORT."""
    settings = configured(options(host="127.0.0.2", port="9"), {"HOST": "127.0.0.1", "PORT": "8", "N_CTX": "512"})

    assert (settings.host, settings.port, settings.n_ctx) == ("127.0.0.2", 9, 512)
    with pytest.raises(SettingsError, match="PORT must be a whole number"):
        configured(options(port="99999"), {})


@pytest.mark.parametrize("environ", [{"WEB_CONCURRENCY": "2"}, {"WEB_CONCURRENCY": "many"}])
def test_more_than_one_worker_is_refused(environ: dict[str, str]) -> None:
    """A second worker would load the model again."""
    with pytest.raises(SettingsError, match="one worker only"):
        configured(options(), environ)
    with pytest.raises(SettingsError, match="one worker only"):
        configured(options(workers=2), {})


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [
        ({"HOST": "0.0.0.0"}, False),
        ({"HOST": "::"}, False),
        ({"HOST": "my-box"}, False),
        ({"HOST": "0.0.0.0", "ADMIN_API_KEYS": "boss"}, False),
        ({"HOST": "0.0.0.0", "API_KEYS": "use"}, True),
        ({"HOST": "0.0.0.0", "ALLOW_ANONYMOUS": "true"}, True),
        ({"HOST": "127.0.0.1"}, True),
        ({"HOST": "::1"}, True),
        ({"HOST": "localhost"}, True),
        ({}, True),
    ],
)
def test_serving_the_network_without_keys_needs_allow_anonymous(environ: dict[str, str], allowed: bool) -> None:
    """Loopback addresses need neither."""
    if allowed:
        configured(options(), environ)
    else:
        with pytest.raises(SettingsError, match="ALLOW_ANONYMOUS"):
            configured(options(), environ)


def test_cors_for_all_needs_keys() -> None:
    """With CORS_ORIGINS=* any web page could use a server without keys."""
    for environ in ({}, {"ADMIN_API_KEYS": "boss"}, {"ALLOW_ANONYMOUS": "true"}):
        with pytest.raises(SettingsError, match=r"CORS_ORIGINS=\* needs API_KEYS"):
            configured(options(), {"CORS_ORIGINS": "*", **environ})

    assert configured(options(), {"CORS_ORIGINS": "*", "API_KEYS": "use"}).cors_origins == ("*",)
    assert configured(options(), {"CORS_ORIGINS": "https://app.example"}).cors_origins == ("https://app.example",)


def test_an_unsafe_admin_key_is_replaced(tmp_path: Path) -> None:
    """Files readable by others, links and invalid keys are replaced. If no file can be written, the key has none."""
    file = tmp_path / ".admin-key"
    first, key_file = admin_key(tmp_path)
    assert key_file == file
    assert admin_key(tmp_path) == (first, file)

    file.chmod(0o644)
    second, _ = admin_key(tmp_path)
    assert second != first

    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(first)
    third, _ = admin_key(tmp_path)
    assert third != first
    assert not file.is_symlink()

    file.write_text("short\n")
    assert len(admin_key(tmp_path)[0]) >= 32

    (tmp_path / "file").write_text("")
    fourth, key_file = admin_key(tmp_path / "file")
    assert (len(fourth) >= 32, key_file) == (True, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".admin-key", "elsewhere", "file"]


@pytest.mark.parametrize(
    ("environ", "weak"),
    [
        ({"API_KEYS": "hunter2"}, ["API_KEYS"]),
        ({"API_KEYS": "0123456789abcdef, short", "ADMIN_API_KEYS": "boss"}, ["API_KEYS", "ADMIN_API_KEYS"]),
        ({"API_KEYS": "0123456789abcdef", "ADMIN_API_KEYS": f"sha256:{'0' * 64}"}, []),
        ({}, []),
    ],
)
def test_short_plain_keys_are_reported(environ: dict[str, str], weak: list[str]) -> None:
    """A plain key needs at least 16 characters. The length of a hashed key is unknown."""
    assert weak_keys(environ) == weak


def run(*arguments: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adapters.local", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_bad_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    """The exit status is 2 and the line names the variable and what is allowed. Here it comes from .env."""
    (tmp_path / ".env").write_text("N_CTX=many\n")
    process = run(folder=tmp_path)

    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "slm-api-server: N_CTX must be a whole number from 64 to 1048576, got 'many'\n"


def test_a_secret_is_not_repeated_in_an_error(tmp_path: Path) -> None:
    """A key with a wrong format may still be a secret."""
    process = run(folder=tmp_path, API_KEYS="sha256:hunter2")

    assert process.returncode == 2
    assert "hunter2" not in process.stderr


def test_version_and_help_are_printed(tmp_path: Path) -> None:
    """Neither starts the server."""
    assert run("--version", folder=tmp_path).stdout == f"slm-api-server {VERSION}\n"
    assert "docs/settings.md" in run("--help", folder=tmp_path).stdout


def test_the_version_is_the_same_everywhere() -> None:
    """It is in pyproject.toml, the code and the changelog's newest release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    newest = next(line for line in headings if "unreleased" not in line)

    assert project["version"] == VERSION
    assert newest.startswith(f"## {VERSION}")


def state(model: str | None = "m", loading: Loading | None = None, error: str | None = None) -> HostState:
    return HostState("available" if model else "unloaded", model, loading, error, None)


def test_the_banner_says_address_model_and_what_to_try() -> None:
    """It shows a placeholder if a key is needed, never the key itself."""
    lines = banner("http://127.0.0.1:8000", Settings(api_keys=keys("hunter2")), state(), "1.2").splitlines()

    assert lines[:2] == ["slm-api-server 1.2 on http://127.0.0.1:8000", "Model: m (loads with the first request)"]
    assert lines[2].startswith(
        "Try: curl http://127.0.0.1:8000/v1/chat/completions -H 'authorization: Bearer YOUR_KEY'"
    )
    assert "Bearer" not in banner("http://x", Settings(), state(), "1.2")


def test_the_banner_without_a_model_says_how_to_get_one() -> None:
    """It shows the error and a hint instead of a curl command."""
    text = banner("http://x", Settings(), state(None, error="MODEL_PATH is not there."), "1.2")

    assert "Model: none (unloaded). Error: MODEL_PATH is not there." in text
    assert "Fix the problem in `error`" in text
    assert "curl" not in text


def test_progress_is_one_line_that_ends_with_the_outcome() -> None:
    """It shows the percentage during the load, then the new state and the seconds."""
    import io
    import time

    states = [state(loading=Loading("download", "m", 30, 120)), state(loading=Loading("load", "m")), state()]
    stream = io.StringIO()
    line = ProgressLine(lambda: states.pop(0) if len(states) > 1 else states[0], stream)
    line.start()
    end = time.monotonic() + 10
    while "after" not in stream.getvalue() and time.monotonic() < end:
        time.sleep(0.02)
    line.stop()
    line.join(5)

    assert "download m 25 % (0 of 0 MB)" in stream.getvalue()
    assert "load m …" in stream.getvalue()
    assert "m is available after" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_log_line_does_not_continue_the_progress_line() -> None:
    """The progress line is erased before a log line is written and redrawn after it."""
    import io
    import logging
    import time

    stream = io.StringIO()
    line = ProgressLine(lambda: state(loading=Loading("load", "m")), stream)
    handler = logging.StreamHandler(stream)
    line.keep_clear_of(handler)
    line.start()
    try:
        end = time.monotonic() + 10
        while "load m" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.02)
        handler.handle(logging.LogRecord("slm", logging.INFO, "", 0, "loaded", None, None))
    finally:
        line.stop()
        line.join(5)

    assert "load m …\r\x1b[Kloaded\n" in stream.getvalue()
