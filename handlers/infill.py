"""POST /infill"""

from __future__ import annotations

from core import infill
from core.service import Service
from core.wire.infill import InfillRequest
from handlers.generate import respond
from handlers.http import Request, Response


async def post_infill(service: Service, request: Request) -> Response:
    """Return the text between a prefix and a suffix, as one body or as events."""
    return await respond(service, request, InfillRequest, infill)
