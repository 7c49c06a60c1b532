"""The route table."""

import inspect

import pytest

from core.errors import MethodNotAllowed, NotFound
from handlers import routes
from handlers.routes import ROUTES, Route

OPERATIONS = {"/health", "/models", "/load", "/reload", "/v1/models", "/v1/chat/completions", "/v1/extract"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_has_its_handler(route: Route) -> None:
    """Named after its method, taking (service, request), async; the table holds names, so this is what checks them."""
    handler = route.resolve()

    assert handler.__name__.startswith(route.method.lower() + "_")
    assert list(inspect.signature(handler).parameters) == ["service", "request"]
    assert inspect.iscoroutinefunction(handler)


def test_the_operations_are_there_and_only_load_and_reload_are_for_admins() -> None:
    """Access is data, and this is what it has to say."""
    assert set(OPERATIONS) <= {route.path for route in ROUTES}
    assert {route.path for route in ROUTES if route.access == "admin"} == {"/load", "/reload"}
    assert {route.path for route in ROUTES if route.access == "open"} == {"/health", "/openapi.json", "/docs"}


def test_an_id_may_hold_slashes_and_a_trailing_slash_is_forgiven() -> None:
    """An id such as org/model is one id; /health/ is /health."""
    assert routes.find("GET", "/v1/models/org/model").path == "/v1/models/"
    assert routes.find("HEAD", "/health/").path == "/health"
    assert routes.find("GET", "/v1/models/").path == "/v1/models"


@pytest.mark.parametrize("path", ["/healthy", "/v1", "/v1/models2", "//health", "", "health", "/V1/models"])
def test_what_is_not_in_the_table_is_not_found(path: str) -> None:
    """No prefix matches by accident; the message lists what exists."""
    with pytest.raises(NotFound, match="GET /health"):
        routes.find("GET", path)


def test_a_wrong_method_names_the_right_ones() -> None:
    """For the message and for Allow."""
    with pytest.raises(MethodNotAllowed) as caught:
        routes.find("PUT", "/v1/models/x")

    assert caught.value.allowed == ("GET", "HEAD")
