"""From an ASGI scope to a Request."""

from typing import Any

import pytest

from adapters.serving.asgi import to_request


def scope(path: str) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "client": None}


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1//models"),
        ("/", "/"),
        ("", "/"),
        ("/v1/models/", "/v1/models/"),
    ],
)
def test_a_base_url_that_doubles_the_slash_still_reaches_the_route(path: str, read: str) -> None:
    """A function URL ends in a slash, and examples everywhere add "/v1" to it."""
    assert to_request(scope(path)).path == read
