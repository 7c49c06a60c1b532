"""`python -m adapters.local` as a process: first lines, keys, settings, signals and ports."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

ROOT = Path(__file__).parents[2]
REAL = ("-m", "adapters.local")
# The same program with an engine that never stops, to test signals during an answer.
ENDLESS = (
    "-c",
    "import sys, adapters.wiring; from tests.fakes import ScriptedEngine, fake_service;"
    "adapters.wiring.build = lambda settings, timeline: fake_service(ScriptedEngine(endless=True, delay=0.02),"
    " shutdown_grace_s=settings.shutdown_grace_s).service;"
    "from adapters.local.__main__ import main; sys.exit(main([]))",
)


@contextmanager
def process(
    folder: Path, program: tuple[str, ...] = REAL, **environ: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Start a process. Yield it, its address and its first three lines. Kill it if the test has not ended it."""
    running = subprocess.Popen(
        [sys.executable, *program],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PORT": "0", "EMBEDDED_MODEL": "off", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    try:
        lines = [running.stdout.readline().rstrip("\n") for _ in range(3)]
        address = re.search(r"http://\S+", lines[0])
        assert address, running.communicate(timeout=10)
        yield running, address[0], lines
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate(timeout=10)


def exit_of(running: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the process to end and return its exit status and stderr."""
    _, errors = running.communicate(timeout=30)
    return running.returncode, errors


def wait_until_refused(address: str) -> None:
    """Wait until the server has closed its listener, which is the first step of stopping."""
    place = urlsplit(address)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_connection((place.hostname, place.port), timeout=10).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("the server still takes connections")


@contextmanager
def chat(address: str) -> Iterator[Iterator[str]]:
    """Yield the lines of a streamed answer."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
        yield answer.iter_lines()


def test_without_a_model_it_starts_and_says_what_to_do(tmp_path: Path) -> None:
    """The printed address answers at once."""
    with process(tmp_path) as (running, address, lines):
        assert lines[1] == "Model: none (unloaded)"
        assert "MODEL_PATH" in lines[2]
        assert httpx.get(f"{address}/health").json()["status"] == "unloaded"
        refused = httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        running.send_signal(signal.SIGTERM)
        code, errors = exit_of(running)

    assert code == 0
    assert "Traceback" not in errors
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("models"), Path("models/.admin-key")]


def test_without_admin_keys_the_server_generates_one(tmp_path: Path) -> None:
    """It is printed, stored for this user only and reused. A loopback address alone is not an administrator."""
    printed = []
    for _ in range(2):
        with process(tmp_path) as (running, address, _):
            assert running.stdout is not None
            line = running.stdout.readline()
            match = re.fullmatch(r"Admin key for /load and /reload: (\S+) \(stored in models/\.admin-key\)\n", line)
            assert match, line
            printed.append(match[1])
            body = {"model_path": "absent.gguf"}
            assert httpx.post(f"{address}/reload", json=body).status_code == 401
            authorized = httpx.post(f"{address}/reload", json=body, headers={"authorization": f"Bearer {printed[-1]}"})
            assert authorized.json()["error"]["code"] == "model_not_found"
            assert httpx.get(f"{address}/v1/models").status_code == 200

    file = tmp_path / "models" / ".admin-key"
    assert printed[0] == printed[1] == file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600


def test_local_admin_replaces_the_key(tmp_path: Path) -> None:
    """`make dev` sets it. Requests of this machine may reload; those of a proxy or a web page may not."""
    with process(tmp_path, LOCAL_ADMIN="true") as (_, address, _):
        body = {"model_path": "absent.gguf"}
        assert httpx.post(f"{address}/reload", json=body).json()["error"]["code"] == "model_not_found"
        for header, value in (("via", "1.1 proxy"), ("origin", "https://evil.example")):
            assert httpx.post(f"{address}/reload", json=body, headers={header: value}).status_code == 403
    assert not (tmp_path / "models" / ".admin-key").exists()


def test_the_environment_overrides_env_files(tmp_path: Path) -> None:
    """./.env sets the variables that are not exported."""
    (tmp_path / ".env").write_text("API_KEYS=from-file\nPORT=1\nMODEL_PATH=absent.gguf\n")
    with process(tmp_path) as (_, address, lines):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"x-api-key": "from-file"}).status_code == 200
        assert "MODEL_PATH names 'absent.gguf'" in lines[1]


def test_a_used_port_is_a_one_line_error(tmp_path: Path) -> None:
    """The exit status is 1 and there is no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.run(
            [sys.executable, *REAL, "--port", str(port)],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "EMBEDDED_MODEL": "off"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"slm-api-server: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_answer_may_use_the_grace_period(tmp_path: Path, number: signal.Signals) -> None:
    """After the signal it continues, while new connections are refused. After SHUTDOWN_GRACE_S it ends with an error
    event and [DONE]. The exit status is 0."""
    with process(tmp_path, ENDLESS, SHUTDOWN_GRACE_S="2") as (running, address, _):
        with chat(address) as lines:
            next(lines)
            running.send_signal(number)
            wait_until_refused(address)
            rest = [line for line in lines if line]
        code, errors = exit_of(running)

    assert len(rest) > 10
    assert '"model_unavailable"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert code == 0
    assert "Traceback" not in errors


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    """There is no traceback either."""
    with process(tmp_path, ENDLESS, SHUTDOWN_GRACE_S="60") as (running, address, _), chat(address) as lines:
        next(lines)
        running.send_signal(signal.SIGINT)
        wait_until_refused(address)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        code, errors = exit_of(running)

    assert code in (0, -signal.SIGINT)
    assert "Traceback" not in errors
