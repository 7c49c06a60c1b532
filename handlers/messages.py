"""POST /v1/messages and POST /v1/messages/count_tokens"""

from __future__ import annotations

from core import messages
from core.service import Service
from core.session import deadline
from core.wire.messages import CountRequest, MessagesRequest
from handlers import sse
from handlers.generate import respond
from handlers.http import Request, Response, decode, json_response


async def post_messages(service: Service, request: Request) -> Response:
    """Return Anthropic's message, or stream its events."""
    return await respond(service, request, MessagesRequest, messages, lambda: sse.TypedFraming(messages.failure))


async def post_count_tokens(service: Service, request: Request) -> Response:
    """Return the prompt tokens that the same message would have."""
    body = decode(request, CountRequest)
    return json_response(await messages.count(service, body, deadline(service.settings, request.deadline)))
