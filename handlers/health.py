"""GET /health"""

from __future__ import annotations

import time

from core.errors import InvalidRequest, Unauthorized
from core.health import health
from core.service import Service
from handlers import auth
from handlers.http import Request, Response, json_response

LONGEST_WAIT_S = 3600.0


async def get_health(service: Service, request: Request) -> Response:
    """Return the state of the model. Without a valid key, a request gets few fields.

    `wait` loads the model, so it needs a key if keys are configured, and another site's page may not use it.
    """
    wait = _wait(request)
    details = auth.level(service, request) != "stranger"
    if wait is not None and not details:
        raise Unauthorized("?wait loads the model and needs an API key; /health alone does not.")
    if wait is not None:
        auth.check_site(service, request)
    return json_response(await health(service, wait=wait, details=details))


def _wait(request: Request) -> float | None:
    """Return the seconds of `?wait=`, limited by the request's deadline."""
    text = request.query.get("wait")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT_S:
        raise InvalidRequest(
            f"'wait' must be a number of seconds from 0 to {LONGEST_WAIT_S:g}, got {text[:40]!r}.", param="wait"
        )
    if request.deadline is not None:
        seconds = min(seconds, max(0.0, request.deadline - time.monotonic() - 0.5))
    return seconds
