"""Logs: text in a terminal, JSON lines elsewhere."""

import datetime
import io
import json
import logging
import time
from collections.abc import Iterator

import pytest

from adapters import logs
from core.settings import Settings
from handlers.http import platform, request_id


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    identity = request_id.set("")
    yield
    request_id.reset(identity)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_outside_a_terminal_each_record_is_one_json_line() -> None:
    """It has the request id, the caller's fields and the traceback."""
    stream = io.StringIO()
    logs.configure(Settings(), stream)
    request_id.set("req_1")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("it\nbroke", extra={"fields": {"status": 500}})

    [line] = lines(stream)
    record = json.loads(line)
    assert {name: record[name] for name in ("level", "logger", "message", "requestId", "status")} == {
        "level": "ERROR",
        "logger": "x",
        "message": "it\nbroke",
        "requestId": "req_1",
        "status": 500,
    }
    assert (record["errorType"], record["errorMessage"]) == ("ValueError", "boom")
    assert record["stackTrace"][-1] == "ValueError: boom"
    moment = datetime.datetime.fromisoformat(record["timestamp"])
    assert abs(moment.timestamp() - time.time()) < 60
    assert "clientRequestId" not in record


@pytest.mark.parametrize(
    ("level", "name"),
    [("debug", "DEBUG"), ("info", "INFO"), ("warning", "WARN"), ("error", "ERROR"), ("critical", "FATAL")],
)
def test_levels_have_the_names_that_cloudwatch_filters_by(level: str, name: str) -> None:
    """These are TRACE, DEBUG, INFO, WARN, ERROR and FATAL; it treats other levels as INFO."""
    stream = io.StringIO()
    logs.configure(Settings(log_level="debug"), stream)
    getattr(logging.getLogger("x"), level)("a line")

    assert json.loads(stream.getvalue())["level"] == name


def test_on_lambda_request_id_is_that_of_the_invocation() -> None:
    """Lambda's reports use it. The client's x-request-id is a second field."""
    stream = io.StringIO()
    logs.configure(Settings(), stream)
    token = platform.set({"requestId": "invocation", "xray_trace_id": "1-2-3"})
    try:
        request_id.set("from-the-client")
        logging.getLogger("x").info("one")
        request_id.set("invocation")
        logging.getLogger("x").info("two")
    finally:
        platform.reset(token)

    one, two = (json.loads(line) for line in lines(stream))
    assert (one["requestId"], one["clientRequestId"], one["xray_trace_id"]) == (
        "invocation",
        "from-the-client",
        "1-2-3",
    )
    assert two["requestId"] == "invocation"
    assert "clientRequestId" not in two


def test_in_a_terminal_a_record_is_text() -> None:
    """The line ends with the request id."""
    stream = Terminal()
    logs.configure(Settings(), stream)
    request_id.set("req_1")
    logging.getLogger("x").info("served")

    [line] = lines(stream)
    assert line.endswith("INFO served [req_1]")


@pytest.mark.parametrize(("form", "is_json"), [("text", False), ("json", True)])
def test_the_format_can_be_set(form: str, is_json: bool) -> None:
    """LOG_FORMAT overrides the default for the stream."""
    stream = io.StringIO() if form == "text" else Terminal()
    logs.configure(Settings(log_format=form), stream)  # type: ignore[arg-type]
    logging.getLogger("x").info("served")

    assert is_json == lines(stream)[0].startswith("{")


def test_http_libraries_never_log_at_debug() -> None:
    """Their debug lines would hold tokens and signed URLs."""
    stream = io.StringIO()
    logs.configure(Settings(log_level="debug"), stream)
    logging.getLogger("x").debug("ours")
    logging.getLogger("botocore.auth").debug("Authorization: secret")
    logging.getLogger("huggingface_hub.utils").info("secret")

    assert [json.loads(line)["message"] for line in lines(stream)] == ["ours"]
