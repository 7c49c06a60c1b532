"""GET /models, GET /v1/models, GET /v1/models/{id}"""

from __future__ import annotations

import core.models
from core.service import Service
from handlers import auth
from handlers.body import json_response
from handlers.http import Request, Response


async def get_models(service: Service, request: Request) -> Response:
    """Where the models lie is told to administrators only."""
    return json_response(await core.models.models(service, paths=auth.level(service, request) == "admin"))


async def get_v1_models(service: Service, request: Request) -> Response:
    return json_response(core.models.listing(service))


async def get_v1_model(service: Service, request: Request) -> Response:
    """An id may hold slashes ("org/model"): it is all of the path behind the route's."""
    return json_response(core.models.one(service, request.path.removeprefix("/v1/models/")))
