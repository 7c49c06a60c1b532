"""POST /v1/extract."""

from __future__ import annotations

from core import extract
from core.extract import ExtractRequest
from core.service import Service
from core.session import deadline
from handlers import reply as answer
from handlers.auth import tenant
from handlers.body import decode
from handlers.http import Request, Response


async def post_extract(service: Service, request: Request) -> Response:
    """JSON from a text, whole or streamed: `extraction.delta` events, then the `extraction`."""
    asked = decode(request, ExtractRequest)
    await extract.check(service, asked)
    beginning = extract.begin(
        service, asked, tenant=tenant(service, request), ends=deadline(service.settings, request.deadline)
    )
    if asked.stream:
        return await answer.streamed(service, beginning, lambda turn: extract.stream(turn, asked))
    return await answer.whole(beginning, lambda turn: extract.complete(turn, asked))
