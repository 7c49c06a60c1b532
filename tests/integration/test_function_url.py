"""The local function URL with real processes: cold start, freezing, crashes, deadlines, limits, stock client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from infra.emulator.environment import Environment
from infra.emulator.function_url import MAX_REQUEST, FunctionURL

ROOT = Path(__file__).parents[2]

# The image's program with a scripted engine instead of llama.cpp, and with routes that fail or block.
PROGRAM = """
import asyncio, os, sys, threading, time
from adapters.serving.asgi import create_app
from adapters.aws_lambda.runtime import Runtime
from core.loader import Loading
from core.settings import keys
from tests.fakes import FakeHost, ScriptedEngine, fake_service

engine = ScriptedEngine("Hello there, dear friend.", delay=0.01)
host = FakeHost(engine)
app = create_app(fake_service(engine, host=host, api_keys=keys("secret")).service)
progress = {"done": 0}

def load():
    while progress["done"] < 40:  # 40 steps of 10 ms, with any number of freezes
        time.sleep(0.01)
        progress["done"] += 1

async def serve(scope, receive, send):
    path = scope.get("path")
    if path == "/exit":
        os._exit(7)
    if path == "/sleep":
        await asyncio.sleep(60)
    if path == "/block":
        time.sleep(60)
    if path == "/progress":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d %d" % (progress["done"], os.getpid())})
        return
    if path == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(int(scope["query_string"])):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    await app(scope, receive, send)

threading.Thread(target=load, daemon=True).start()
sys.exit(asyncio.run(Runtime(serve, os.environ, mode=os.environ.get("RESPONSE_MODE", "auto")).run()))
"""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A plain HTTP client of the function URL, and the URL's reports."""

    def __init__(self, port: int, environment: Environment, reports: list[str]) -> None:
        self.port = port
        self.environment = environment
        self.reports = reports

    def get(self, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            content = None if body is None else json.dumps(body)
            content_type = {"content-type": "application/json"} if content else {}
            connection.request(method, path, content, {**content_type, **headers})
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def wait_for_reports(self, count: int) -> list[str]:
        """Return the reports once there are `count`. A report is written after the answer."""
        for _ in range(500):
            if len(self.reports) >= count:
                break
            time.sleep(0.01)
        return self.reports


@contextmanager
def function_url(
    *, timeout_s: float = 30.0, mode: str = "auto", command: list[str] | None = None, **environ: str
) -> Iterator[Client]:
    """Run a function URL in a thread. Fail the test if the runtime violates the Runtime API."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "RESPONSE_MODE": mode, **environ}
    environment = Environment(command or [sys.executable, "-c", PROGRAM], environ, timeout_s=timeout_s)
    reports: list[str] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(FunctionURL([environment], reports.append), log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(listener.getsockname()[1], environment, reports)
        finally:
            server.should_exit = True
            thread.join(30)
    assert [report for report in reports if report.startswith("violation")] == []


@pytest.fixture(scope="module")
def url() -> Iterator[Client]:
    with function_url() as client:
        yield client


def test_the_stock_openai_client_streams(url: Client) -> None:
    """A chat is streamed through the event and the Runtime API, one chunk at a time."""
    from openai import OpenAI

    messages: Any = [{"role": "user", "content": "Hello"}]
    with (
        OpenAI(base_url=f"http://127.0.0.1:{url.port}/v1", api_key="secret", max_retries=0) as client,
        client.chat.completions.create(model="fake-1b", messages=messages, stream=True) as stream,
    ):
        texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]

    assert "".join(texts) == "Hello there, dear friend."
    assert len([text for text in texts if text]) == 4


def test_errors_are_passed_through(url: Client) -> None:
    """A wrong key gets the application's 401 with its headers."""
    response = url.get("/v1/models", authorization="Bearer wrong")

    assert (response.status, json.loads(response.body)["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_each_invocation_has_a_report() -> None:
    """It has init, time to first byte, duration, memory and the billed GB-s."""
    with function_url() as client:
        client.get("/health")
        [line] = client.wait_for_reports(1)

    for field in ("request=", "init=", "ttft=", "duration=", "/3008MB", "GB-s"):
        assert field in line


def test_events_over_six_megabytes_are_refused() -> None:
    """As on Lambda, the function is not invoked. The only report belongs to the next request."""
    with function_url() as client:
        response = client.get("/v1/extract", method="POST", body={"text": "x" * MAX_REQUEST})
        assert client.get("/health").status == 200

    assert response.status == 413
    assert len(client.reports) == 1


def test_streams_end_at_two_hundred_megabytes(url: Client) -> None:
    """The rest of a longer answer is cut off."""
    assert len(url.get("/large?203").body) == 200 << 20


def test_a_load_survives_freezing() -> None:
    """Between invocations the process does not run; the load continues with the next one."""
    with function_url() as client:
        steps, switches = [], []
        for _ in range(100):
            step, pid = (int(part) for part in client.get("/progress").body.split())
            steps.append(step)
            assert _frozen(pid)
            before = _switches(pid)
            time.sleep(0.02)  # the time of two steps; a frozen process does none
            switches.append(_switches(pid) - before)
            if step == 40:
                break

    assert steps[-1] == 40
    assert steps == sorted(steps)
    assert set(switches) == {0}


def _switches(pid: int) -> int:
    """Return the voluntary context switches of the process's threads. Each step's sleep causes one."""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(int(re.findall(r"\nvoluntary_ctxt_switches:\s*(\d+)", task.read_text())[0]) for task in tasks)


def _frozen(pid: int) -> bool:
    """Whether all threads of the process are stopped, after waiting up to 3 s for it."""
    for _ in range(300):
        threads = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        if set(threads) == {"T"}:
            return True
        time.sleep(0.01)
    return False


def test_after_a_crash_there_is_a_new_process() -> None:
    """The crashed invocation is a 502."""
    with function_url() as client:
        first = client.get("/progress").body.split()[1]
        assert client.get("/exit").status == 502
        assert "Runtime.ExitError" in client.wait_for_reports(2)[1]
        second = client.get("/progress").body.split()[1]
        assert first != second
        assert "init=-" not in client.wait_for_reports(3)[2]


def test_the_runtime_answers_504_before_the_deadline() -> None:
    """The process of an application that waits too long survives."""
    with function_url(timeout_s=3.0) as client:
        pid = client.get("/progress").body.split()[1]
        assert client.get("/sleep").status == 504
        assert client.get("/progress").body.split()[1] == pid


def test_a_blocked_process_is_killed_at_the_deadline() -> None:
    """Code that blocks the event loop cannot be cancelled. The next event gets a new process."""
    with function_url(timeout_s=2.0) as client:
        assert client.get("/block").status == 502
        assert "Sandbox.Timedout" in client.wait_for_reports(1)[0]
        assert client.get("/progress").status == 200


def test_buffered_mode_works_behind_a_buffered_url() -> None:
    """With RESPONSE_MODE=buffered, requests get the same answers unstreamed."""
    with function_url(mode="buffered") as client:
        response = client.get("/v1/models", authorization="Bearer secret")
        assert json.loads(response.body)["data"][0]["id"] == "fake-1b"
        body = {"model": "fake-1b", "messages": [{"role": "user", "content": "x"}], "stream": True}
        text = client.get("/v1/chat/completions", method="POST", body=body, authorization="Bearer secret").body
        assert text.endswith(b"data: [DONE]\n\n")


def test_invalid_settings_are_an_init_error() -> None:
    """The client gets a 502."""
    command = [sys.executable, "-m", "adapters.aws_lambda"]
    with function_url(command=command) as client:
        assert client.get("/health").status == 502
        assert "Runtime.SettingsError" in client.wait_for_reports(1)[0]


def test_a_failed_start_is_an_init_error() -> None:
    """The exception's text of a broken installation is only in the log."""
    program = "import sys; sys.modules['adapters.wiring'] = None\nfrom adapters.aws_lambda.__main__ import main; main()"
    with function_url(command=[sys.executable, "-c", program], IAM_AUTH="true") as client:
        assert client.get("/health").status == 502
        assert "Runtime.InitFailed" in client.wait_for_reports(1)[0]


def test_sigterm_ends_the_process() -> None:
    """Lambda's shutdown signal ends an idle process with status 0."""
    with function_url() as client:
        pid = int(client.get("/progress").body.split()[1])
        assert _frozen(pid)
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
        process = client.environment.process
        assert process is not None
        for _ in range(500):
            if process.returncode is not None:
                break
            time.sleep(0.01)
        assert process.returncode == 0


def test_the_entry_point_needs_lambda() -> None:
    """Without the Runtime API it exits with status 2 and names `make url`."""
    import subprocess

    process = subprocess.run(
        [sys.executable, "-m", "adapters.aws_lambda"], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True
    )

    assert process.returncode == 2
    assert b"make url" in process.stderr


def test_a_report_bills_init_and_memory() -> None:
    """GB-s are milliseconds of init and invocation, rounded up, times the configured memory."""
    from infra.emulator.environment import Report

    report = Report("id", 1000.2, 5.0, 499.1, 2048, 300, None)

    assert report.billed_gb_s == 3.0
    assert json.dumps(str(report)).count("init=1000ms") == 1
