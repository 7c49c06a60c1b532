"""The route table."""

import inspect

import pytest

from core.errors import MethodNotAllowed, NotFound
from handlers import routes
from handlers.routes import ROUTES, Route

OPERATIONS = {"/health", "/models", "/load", "/reload", "/v1/models", "/v1/chat/completions", "/v1/extract"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_has_its_handler(route: Route) -> None:
    """It is async, takes (service, request) and its name begins with the method. The table holds names only."""
    handler = route.resolve()

    assert handler.__name__.startswith(route.method.lower() + "_")
    assert list(inspect.signature(handler).parameters) == ["service", "request"]
    assert inspect.iscoroutinefunction(handler)


def test_only_load_and_reload_are_for_administrators() -> None:
    """Only /health is open. All operations have a route."""
    assert set(OPERATIONS) <= {route.path for route in ROUTES}
    assert {route.path for route in ROUTES if route.access == "admin"} == {"/load", "/reload"}
    assert {route.path for route in ROUTES if route.access == "open"} == {"/health", "/openapi.json", "/docs"}


def test_ids_may_have_slashes_and_trailing_slashes_are_ignored() -> None:
    """org/model is one id, and /health/ is /health."""
    assert routes.find("GET", "/v1/models/org/model").path == "/v1/models/"
    assert routes.find("HEAD", "/health/").path == "/health"
    assert routes.find("GET", "/v1/models/").path == "/v1/models"


@pytest.mark.parametrize("path", ["/healthy", "/v1", "/v1/models2", "//health", "", "health", "/V1/models"])
def test_other_paths_are_not_found(path: str) -> None:
    """Prefixes do not match by accident. The message lists the routes."""
    with pytest.raises(NotFound, match="GET /health"):
        routes.find("GET", path)


def test_an_exact_path_excludes_one_with_a_parameter() -> None:
    """`input_tokens` is no id of a response."""
    assert routes.allowed("/v1/responses/input_tokens") == ("POST",)
    assert routes.allowed("/v1/responses/resp_1") == ("GET", "HEAD", "DELETE")
    with pytest.raises(MethodNotAllowed):
        routes.find("GET", "/v1/responses/input_tokens/")


def test_a_wrong_method_lists_the_allowed_ones() -> None:
    """They are for the message and the Allow header."""
    with pytest.raises(MethodNotAllowed) as caught:
        routes.find("PUT", "/v1/models/x")

    assert caught.value.allowed == ("GET", "HEAD")
