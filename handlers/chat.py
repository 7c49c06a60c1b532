"""POST /v1/chat/completions"""

from __future__ import annotations

from core import chat
from core.service import Service
from core.wire.chat import ChatRequest
from handlers.http import Request, Response
from handlers.reply import respond


async def post_chat(service: Service, request: Request) -> Response:
    """Return OpenAI's chat completion, as one body or as chunks."""
    return await respond(service, request, ChatRequest, chat)
