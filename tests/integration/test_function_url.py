"""The local function URL, with real processes: cold start, freezing, crashes, deadlines, limits, the stock client."""

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

# A process like the image's, with a scripted engine instead of llama.cpp, and routes that misbehave.
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
    while progress["done"] < 40:  # 40 steps of 10 ms, wherever it is frozen
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
    """Raw HTTP against the function URL, and what it reported."""

    def __init__(self, port: int, environment: Environment, reports: list[str]) -> None:
        self.port = port
        self.environment = environment
        self.reports = reports

    def get(self, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            content = None if body is None else json.dumps(body)
            given = {"content-type": "application/json"} if content else {}
            connection.request(method, path, content, {**given, **headers})
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def settled(self, count: int) -> list[str]:
        """The reports, once there are `count`: a report follows the answer."""
        for _ in range(500):
            if len(self.reports) >= count:
                break
            time.sleep(0.01)
        return self.reports


@contextmanager
def function_url(
    *, timeout_s: float = 30.0, mode: str = "auto", command: list[str] | None = None, **environ: str
) -> Iterator[Client]:
    """A function URL in a thread; fails the test if the runtime broke the Runtime API's rules."""
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
    """`OpenAI(base_url=...)` streams a chat through events, Runtime API and back, piece by piece."""
    from openai import OpenAI

    messages: Any = [{"role": "user", "content": "Hello"}]
    with (
        OpenAI(base_url=f"http://127.0.0.1:{url.port}/v1", api_key="secret", max_retries=0) as client,
        client.chat.completions.create(model="fake-1b", messages=messages, stream=True) as stream,
    ):
        texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]

    assert "".join(texts) == "Hello there, dear friend."
    assert len([text for text in texts if text]) == 4


def test_errors_pass_as_they_are(url: Client) -> None:
    """A wrong key is the application's 401, with its headers."""
    response = url.get("/v1/models", authorization="Bearer wrong")

    assert (response.status, json.loads(response.body)["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_line_for_each_invocation() -> None:
    """Init (once), time to first byte, duration, memory and the bill."""
    with function_url() as client:
        client.get("/health")
        [line] = client.settled(1)

    for field in ("request=", "init=", "ttft=", "duration=", "/3008MB", "GB-s"):
        assert field in line


def test_events_over_six_megabytes_are_refused() -> None:
    """As on Lambda the front end refuses, and the function is not called: the one report is the next request's."""
    with function_url() as client:
        response = client.get("/v1/extract", method="POST", body={"text": "x" * MAX_REQUEST})
        assert client.get("/health").status == 200

    assert response.status == 413
    assert len(client.reports) == 1


def test_streams_end_at_two_hundred_megabytes(url: Client) -> None:
    """What is over the limit of a streamed answer is cut off."""
    assert len(url.get("/large?203").body) == 200 << 20


def test_a_load_survives_freezing() -> None:
    """Between invocations the process does not run; what it was loading goes on with the next one."""
    with function_url() as client:
        seen, computed = [], []
        for _ in range(100):
            done, pid = (int(part) for part in client.get("/progress").body.split())
            seen.append(done)
            assert _frozen(pid)
            before = _switches(pid)
            time.sleep(0.02)  # two steps' worth, in which a frozen process does none
            computed.append(_switches(pid) - before)
            if done == 40:
                break

    assert seen[-1] == 40
    assert seen == sorted(seen)
    assert set(computed) == {0}


def _switches(pid: int) -> int:
    """The voluntary switches of the process's threads: a thread that sleeps for a step makes one."""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(int(re.findall(r"\nvoluntary_ctxt_switches:\s*(\d+)", task.read_text())[0]) for task in tasks)


def _frozen(pid: int) -> bool:
    """Whether all threads of the process are stopped, within the time that reporting may take."""
    for _ in range(300):
        threads = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        if set(threads) == {"T"}:
            return True
        time.sleep(0.01)
    return False


def test_a_crash_is_a_502_and_a_new_process() -> None:
    """A process that dies takes its invocation with it; the next one gets another process."""
    with function_url() as client:
        first = client.get("/progress").body.split()[1]
        assert client.get("/exit").status == 502
        assert "Runtime.ExitError" in client.settled(2)[1]
        second = client.get("/progress").body.split()[1]
        assert first != second
        assert "init=-" not in client.settled(3)[2]


def test_the_deadline_is_answered_before_lambda_kills() -> None:
    """An application that waits too long is answered 504 by the runtime, and its process lives on."""
    with function_url(timeout_s=3.0) as client:
        pid = client.get("/progress").body.split()[1]
        assert client.get("/sleep").status == 504
        assert client.get("/progress").body.split()[1] == pid


def test_a_blocked_process_is_killed_at_the_deadline() -> None:
    """Code that blocks the loop cannot be cancelled: Lambda kills it, the next event has a new process."""
    with function_url(timeout_s=2.0) as client:
        assert client.get("/block").status == 502
        assert "Sandbox.Timedout" in client.settled(1)[0]
        assert client.get("/progress").status == 200


def test_buffered_mode_behind_a_buffered_url() -> None:
    """With RESPONSE_MODE=buffered the same requests have the same answers, whole."""
    with function_url(mode="buffered") as client:
        response = client.get("/v1/models", authorization="Bearer secret")
        assert json.loads(response.body)["data"][0]["id"] == "fake-1b"
        body = {"model": "fake-1b", "messages": [{"role": "user", "content": "x"}], "stream": True}
        text = client.get("/v1/chat/completions", method="POST", body=body, authorization="Bearer secret").body
        assert text.endswith(b"data: [DONE]\n\n")


def test_an_init_error_is_told() -> None:
    """Settings that cannot be are an init error in our words, and 502 for whoever called."""
    command = [sys.executable, "-m", "adapters.aws_lambda"]
    with function_url(command=command) as client:
        assert client.get("/health").status == 502
        assert "Runtime.SettingsError" in client.settled(1)[0]


def test_a_start_that_fails_is_told() -> None:
    """A broken installation is an init error with the exception's name; its text is in the log only."""
    program = "import sys; sys.modules['adapters.wiring'] = None\nfrom adapters.aws_lambda.__main__ import main; main()"
    with function_url(command=[sys.executable, "-c", program], IAM_AUTH="true") as client:
        assert client.get("/health").status == 502
        assert "Runtime.InitFailed" in client.settled(1)[0]


def test_sigterm_ends_the_process() -> None:
    """Lambda's shutdown signal ends an idle process at once, with status 0."""
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
    """Started by hand it says what it is for, and how to try it."""
    import subprocess

    ended = subprocess.run(
        [sys.executable, "-m", "adapters.aws_lambda"], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True
    )

    assert ended.returncode == 2
    assert b"make url" in ended.stderr


def test_reports_bill_init_and_memory() -> None:
    """GB-s are milliseconds of init and invocation, rounded up, times the memory configured."""
    from infra.emulator.environment import Report

    report = Report("id", 1000.2, 5.0, 499.1, 2048, 300, None)

    assert report.billed_gb_s == 3.0
    assert json.dumps(str(report)).count("init=1000ms") == 1
