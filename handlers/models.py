"""GET /models, GET /v1/models, GET /v1/models/{id}"""

from __future__ import annotations

import core.models
from core.service import Service
from handlers import auth
from handlers.http import Request, Response, json_response


async def get_models(service: Service, request: Request) -> Response:
    """Return the served model and all models on this machine. Only administrators see paths."""
    return json_response(await core.models.models(service, paths=auth.level(service, request) == "admin"))


async def get_v1_models(service: Service, request: Request) -> Response:
    """Return the models that a request may name, in Anthropic's shape for a client that sends its version header."""
    if "anthropic-version" in request.headers:
        return json_response(core.models.anthropic_list(service))
    return json_response(core.models.model_list(service))


async def get_v1_model(service: Service, request: Request) -> Response:
    """Return one model. An id may contain slashes ("org/model"), so it is the rest of the path."""
    return json_response(core.models.model_entry(service, request.path.removeprefix("/v1/models/")))
