"""`to_request` turns an ASGI scope into a Request."""

from typing import Any

import pytest

from adapters.serving.asgi import to_request


def scope(path: str) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "client": None}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1//models"),
        ("/", "/"),
        ("", "/"),
        ("/v1/models/", "/v1/models/"),
    ],
)
def test_a_double_slash_after_the_host_is_removed(path: str, expected: str) -> None:
    """A function URL ends in a slash, and most examples append "/v1" to it."""
    assert to_request(scope(path)).path == expected
