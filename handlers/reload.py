"""POST /reload"""

from __future__ import annotations

import dataclasses

from core.reload import ReloadRequest, reload
from core.service import Service
from handlers.http import Request, Response, decode, json_response


async def post_reload(service: Service, request: Request) -> Response:
    if not request.body.strip():
        request = dataclasses.replace(request, body=b"{}")  # no field is required: a bare POST reloads the model
    return json_response(await reload(service, decode(request, ReloadRequest)))
