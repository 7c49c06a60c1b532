"""POST /v1/completions"""

from __future__ import annotations

from core import completions
from core.service import Service
from core.wire.completions import CompletionRequest
from handlers.generate import respond
from handlers.http import Request, Response


async def post_completions(service: Service, request: Request) -> Response:
    """Return OpenAI's legacy completion, as one body or as chunks."""
    return await respond(service, request, CompletionRequest, completions)
