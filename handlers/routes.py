"""The routes of the HTTP API, as data. A handler is imported on its first request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module

from core.errors import MethodNotAllowed, NotFound
from core.service import Service
from handlers.auth import Access
from handlers.http import Request, Response

Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` matches exactly, or, if it ends in "/", everything below it. `{id}` matches one segment."""

    method: str
    path: str
    handler: str  # "module:function"; see `resolve`
    access: Access

    def resolve(self) -> Handler:
        module, _, function = self.handler.partition(":")
        handler: Handler = getattr(import_module(module), function)
        return handler


ROUTES = (
    Route("GET", "/health", "handlers.health:get_health", "open"),
    Route("GET", "/models", "handlers.models:get_models", "user"),
    Route("GET", "/v1/models", "handlers.models:get_v1_models", "user"),
    Route("GET", "/v1/models/", "handlers.models:get_v1_model", "user"),
    Route("POST", "/load", "handlers.load:post_load", "admin"),
    Route("POST", "/reload", "handlers.reload:post_reload", "admin"),
    Route("POST", "/v1/chat/completions", "handlers.generate:post_chat", "user"),
    Route("POST", "/chat/completions", "handlers.generate:post_chat", "user"),  # a base_url without /v1
    Route("POST", "/v1/completions", "handlers.completions:post_completions", "user"),
    Route("POST", "/completions", "handlers.completions:post_completions", "user"),
    Route("POST", "/infill", "handlers.infill:post_infill", "user"),
    Route("POST", "/v1/extract", "handlers.generate:post_extract", "user"),
    Route("GET", "/metrics", "handlers.metrics:get_metrics", "metrics"),
    Route("POST", "/v1/chat/completions/input_tokens", "handlers.tokens:post_input_tokens", "user"),
    Route("POST", "/chat/completions/input_tokens", "handlers.tokens:post_input_tokens", "user"),
    Route("POST", "/tokenize", "handlers.tokens:post_tokenize", "user"),
    Route("POST", "/detokenize", "handlers.tokens:post_detokenize", "user"),
    Route("POST", "/v1/embeddings", "handlers.embeddings:post_embeddings", "user"),
    Route("POST", "/embeddings", "handlers.embeddings:post_embeddings", "user"),
    Route("POST", "/v1/rerank", "handlers.embeddings:post_rerank", "user"),
    Route("POST", "/rerank", "handlers.embeddings:post_rerank", "user"),
    Route("POST", "/v1/messages", "handlers.messages:post_messages", "user"),
    Route("POST", "/v1/messages/count_tokens", "handlers.messages:post_count_tokens", "user"),
    Route("POST", "/v1/responses", "handlers.responses:post_responses", "user"),
    Route("POST", "/responses", "handlers.responses:post_responses", "user"),
    Route("POST", "/v1/responses/input_tokens", "handlers.responses:post_input_tokens", "user"),
    Route("POST", "/responses/input_tokens", "handlers.responses:post_input_tokens", "user"),
    Route("GET", "/v1/responses/{id}", "handlers.responses:get_response", "user"),
    Route("GET", "/responses/{id}", "handlers.responses:get_response", "user"),
    Route("DELETE", "/v1/responses/{id}", "handlers.responses:delete_response", "user"),
    Route("DELETE", "/responses/{id}", "handlers.responses:delete_response", "user"),
    Route("GET", "/v1/responses/{id}/input_items", "handlers.responses:get_input_items", "user"),
    Route("GET", "/responses/{id}/input_items", "handlers.responses:get_input_items", "user"),
    Route("GET", "/openapi.json", "handlers.openapi:get_openapi", "open"),
    Route("GET", "/docs", "handlers.docs:get_docs", "open"),
)


def speaks_anthropic(path: str) -> bool:
    """Return whether errors on this path have Anthropic's envelope."""
    return path.startswith("/v1/messages")


def find(method: str, path: str) -> Route:
    """Return the route; HEAD uses the route of GET. Raises NotFound or MethodNotAllowed, which list what exists."""
    matches = _at(path)
    if not matches:
        routes = ", ".join(f"{route.method} {route.path}" for route in ROUTES if not route.path.endswith("/"))
        raise NotFound(f"There is no route {path[:200]!r}. Routes: {routes}.")
    effective = "GET" if method == "HEAD" else method
    for route in matches:
        if route.method == effective:
            return route
    raise MethodNotAllowed(method[:20], path[:200], allowed(path))


def allowed(path: str) -> tuple[str, ...]:
    """Return the methods of `path` except OPTIONS, or nothing if no route has that path."""
    methods = [route.method for route in _at(path)]
    if "GET" in methods:
        methods.insert(methods.index("GET") + 1, "HEAD")
    return tuple(dict.fromkeys(methods))


def _at(path: str) -> list[Route]:
    """Return the routes at `path`. One that names the path exactly excludes those with a parameter."""
    matches = [route for route in ROUTES if _matches(route.path, path)]
    return [route for route in matches if route.path == path.rstrip("/")] or matches


def _matches(pattern: str, path: str) -> bool:
    if pattern.endswith("/"):
        return path.startswith(pattern) and len(path) > len(pattern)
    if "{" in pattern:
        before, _, after = pattern.partition("{id}")
        middle = path.removeprefix(before).removesuffix(after)
        return path.startswith(before) and path.endswith(after) and middle != "" and "/" not in middle
    return path == pattern or path == pattern + "/"
