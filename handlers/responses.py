"""POST /v1/responses and /v1/responses/input_tokens; GET, DELETE and input_items of stored responses"""

from __future__ import annotations

from core import responses
from core.errors import InvalidRequest
from core.responses import Turn
from core.service import Service
from core.session import deadline
from core.wire.responses.request import ResponsesRequest
from handlers import sse
from handlers.auth import tenant
from handlers.generate import respond
from handlers.http import Request, Response, decode, json_response


async def post_responses(service: Service, request: Request) -> Response:
    """Return OpenAI's response, or stream its events."""
    turn = Turn(service, tenant(service, request))
    return await respond(service, request, ResponsesRequest, turn, lambda: sse.TypedFraming(turn.failure))


async def post_input_tokens(service: Service, request: Request) -> Response:
    """Return the `input_tokens` that the same response would have in its usage."""
    turn = Turn(service, tenant(service, request))
    await turn.check(service, decode(request, ResponsesRequest))
    return json_response(await turn.count(deadline(service.settings, request.deadline)))


async def get_response(service: Service, request: Request) -> Response:
    """Return a stored response."""
    if request.query.get("stream", "false").lower() not in ("false", "0", ""):
        raise InvalidRequest(
            "'stream' is not supported here: a stored response is complete. Leave it out.", param="stream"
        )
    body = responses.retrieve(service, tenant(service, request), _identity(request))
    return Response(200, (("content-type", "application/json"),), body)


async def get_input_items(service: Service, request: Request) -> Response:
    """Return a page of the conversation before a stored response."""
    page = responses.input_items(service, tenant(service, request), _identity(request), request.query)
    return json_response(page)


async def delete_response(service: Service, request: Request) -> Response:
    """Delete a stored response."""
    return json_response(responses.delete(service, tenant(service, request), _identity(request)))


def _identity(request: Request) -> str:
    """Return the id in the path: the segment after "responses"."""
    segments = request.path.split("/")
    return segments[segments.index("responses") + 1]
