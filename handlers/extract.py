"""POST /v1/extract"""

from __future__ import annotations

from core import extract
from core.extract import ExtractRequest
from core.service import Service
from handlers.http import Request, Response
from handlers.reply import respond


async def post_extract(service: Service, request: Request) -> Response:
    """Extract JSON from a text. A stream has `extraction.delta` events, then the `extraction`."""
    return await respond(service, request, ExtractRequest, extract)
