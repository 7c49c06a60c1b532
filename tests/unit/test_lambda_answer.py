"""Prelude and failure, the two documents that Lambda itself reads."""

from __future__ import annotations

import base64
import json

import pytest

from adapters.aws_lambda.answer import Failure, checked, has_body, prelude
from infra.emulator import checks as runtime_api_checks


def test_prelude_is_json_and_eight_nuls() -> None:
    """It holds the status, joined headers and a list of cookies; JSON cannot contain the separator."""
    raw = prelude(200, checked([(b"A", b"1"), (b"a", b"\0x"[1:]), (b"set-cookie", b"c=1")]))

    record = json.loads(raw.removesuffix(b"\0" * 8))
    assert record == {
        "statusCode": 200,
        "headers": {"a": "1, x", "content-type": "application/octet-stream"},
        "cookies": ["c=1"],
    }
    assert list(runtime_api_checks.prelude(raw[:-8])) == []


@pytest.mark.parametrize("pair", [(b"a", b"b\rc"), (b"a\n", b"b"), (b"a", b"\0"), (b"", b"x")])
def test_headers_with_control_characters_are_refused(pair: tuple[bytes, bytes]) -> None:
    """Line breaks, NULs and empty names raise ValueError."""
    with pytest.raises(ValueError, match="header"):
        checked([pair])


@pytest.mark.parametrize(
    ("method", "status", "expected"),
    [("GET", 200, True), ("HEAD", 200, False), ("GET", 204, False), ("GET", 304, False), ("POST", 404, True)],
)
def test_which_answers_have_a_body(method: str, status: int, expected: bool) -> None:
    """Answers to HEAD and with 204 or 304 have none."""
    assert has_body(method, status) is expected


class X(Exception):
    pass


class _Private(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("secret"), "Function.ValueError"),
        (X(), "Function.Error"),
        (_Private(), "Function.Private"),
        (type("Ошибка", (Exception,), {})(), "Function.Error"),
    ],
    ids=["plain", "one letter", "underscore", "cyrillic"],
)
def test_error_types_are_valid_for_lambda(error: Exception, kind: str) -> None:
    """Lambda replaces types that do not match its pattern. The body never holds the exception's text."""
    failure = Failure.of(error, "our message")

    assert failure.type == kind
    assert list(runtime_api_checks.failure({"lambda-runtime-function-error-type": kind}, failure.body())) == []
    assert b"secret" not in failure.body()


def test_trailers_are_base64_json_of_limited_size() -> None:
    """Lambda drops raw JSON in a trailer, and all trailers must stay below 8 KiB."""
    lines = Failure("Function.A" + "b" * 3, "ü" * 100_000).trailers().decode().split("\r\n")

    trailers = dict(line.split(": ", 1) for line in lines if line)
    assert len(json.loads(base64.b64decode(trailers["Lambda-Runtime-Function-Error-Body"]))["errorMessage"]) == 800
    assert sum(map(len, lines)) < 8192
