"""POST /v1/chat/completions."""

from __future__ import annotations

from core import chat
from core.service import Service
from core.session import deadline
from core.wire.chat import ChatRequest
from handlers import reply as answer
from handlers.auth import tenant
from handlers.body import decode
from handlers.http import Request, Response


async def post_chat(service: Service, request: Request) -> Response:
    """OpenAI's chat completion, whole or streamed."""
    asked = decode(request, ChatRequest)
    await chat.check(service, asked)
    beginning = chat.begin(
        service, asked, tenant=tenant(service, request), ends=deadline(service.settings, request.deadline)
    )
    if asked.stream:
        return await answer.streamed(service, beginning, lambda turn: chat.chunks(turn, asked))
    return await answer.whole(beginning, lambda turn: chat.complete(turn, asked))
