"""Dispatch a Request: find its route, check access, run the handler and return the Response.

All errors become responses here, in the envelope of the path's protocol: an ApiError with its own message, anything
else as a generic 500 whose cause is logged. Errors after the first byte of a stream become events of the stream
(`handlers.sse`).
"""

from __future__ import annotations

import dataclasses
import logging
import re

from core.errors import ApiError, MethodNotAllowed, Unauthorized, UnsupportedMediaType
from core.service import Service
from handlers import auth, routes
from handlers.http import Request, Response, json_response, request_id

logger = logging.getLogger("slm.dispatch")

Headers = tuple[tuple[str, str], ...]

_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}")


async def dispatch(service: Service, request: Request) -> Response:
    """Answer a request. Raises nothing but CancelledError. The caller closes the Response."""
    request_id.set(request.id)
    try:
        response = await _answer(service, request)
    except Exception as error:  # noqa: BLE001 - logged and returned as a generic 500
        response = refusal(error, request.path)
    return finished(service, request, response)


def admit(service: Service, request: Request) -> None:
    """Check everything that needs only the head: the route, access and the content type.

    An adapter calls this before it reads the body. Raises the ApiError that the client gets.
    """
    if request.method == "OPTIONS":
        return
    route = routes.find(request.method, request.path)
    auth.authorize(service, request, route.access)
    if route.method == "POST":
        _check_content_type(request)


def refusal(error: Exception, path: str) -> Response:
    """Return an error as a Response. Adapters use it for errors before there is a request to dispatch."""
    api_error = to_api_error(error)
    headers: Headers = ()
    if api_error.retry_after is not None:
        headers = (("retry-after", str(api_error.retry_after)),)
    elif isinstance(api_error, MethodNotAllowed):
        headers = (("allow", ", ".join((*api_error.allowed, "OPTIONS"))),)
    elif isinstance(api_error, Unauthorized):
        headers = (("www-authenticate", "Bearer"),)
    if routes.speaks_anthropic(path):
        return json_response(api_error.anthropic_body(request_id.get()), api_error.status, headers)
    return json_response(api_error.body(), api_error.status, headers)


def to_api_error(error: Exception) -> ApiError:
    """Return an ApiError unchanged. Log any other exception and return a generic 500 with the request id."""
    if isinstance(error, ApiError) and error.status != ApiError.status:
        return error
    logger.error("unhandled exception: %s", type(error).__name__, exc_info=error)
    return ApiError(f"Internal server error. Details are in the server log under request id {request_id.get()}.")


def finished(service: Service, request: Request, response: Response) -> Response:
    """Add the headers of every response: the request id and CORS."""
    common = (("x-request-id", request.id), *_cors(service, request))
    if routes.speaks_anthropic(request.path):
        common = (("request-id", request.id), *common)
    return dataclasses.replace(response, headers=(*response.headers, *common))


async def _answer(service: Service, request: Request) -> Response:
    if request.method == "OPTIONS":
        return _options(request)
    admit(service, request)
    route = routes.find(request.method, request.path)
    response = await route.resolve()(service, request)
    if request.method == "HEAD":
        await response.aclose()
        length = str(len(response.body)) if isinstance(response.body, bytes) else None
        headers = (*response.headers, *((("content-length", length),) if length else ()))
        return Response(response.status, headers)
    return response


def _options(request: Request) -> Response:
    """Return the methods of a path. It needs no key. For a browser's preflight, `_cors` adds the other headers."""
    allowed = routes.allowed(request.path)
    if not allowed and request.path != "*":
        routes.find("OPTIONS", request.path)  # raises NotFound with the routes
    return Response(204, (("allow", ", ".join((*allowed, "OPTIONS"))),))


def _check_content_type(request: Request) -> None:
    """Accept JSON only. Another site's page can send a form or text/plain without a preflight (a "simple" request)."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        shown = repr(content_type[:80]) if content_type else "none"
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {shown}.")


def _cors(service: Service, request: Request) -> Headers:
    origins = service.settings.cors_origins
    if not origins:
        return ()
    origin = request.headers.get("origin")
    if origin is None or ("*" not in origins and origin not in origins):
        return (("vary", "origin"),)
    headers: Headers = (
        ("vary", "origin"),
        ("access-control-allow-origin", "*" if "*" in origins else origin),
        ("access-control-expose-headers", "x-request-id, retry-after, server-timing"),
    )
    if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
        request_headers = request.headers.get("access-control-request-headers", "")
        if not _HEADER_NAMES.fullmatch(request_headers):
            request_headers = "authorization, content-type, x-api-key"
        headers += (
            ("access-control-allow-methods", ", ".join((*routes.allowed(request.path), "OPTIONS"))),
            ("access-control-allow-headers", request_headers),
            ("access-control-max-age", "600"),
        )
    return headers
