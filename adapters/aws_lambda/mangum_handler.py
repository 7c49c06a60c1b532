"""The handler for Amazon's own Python runtime (awslambdaric): Mangum round the same application, buffered."""

from __future__ import annotations

import os
import time
from typing import Any

from adapters.aws_lambda.cycle import App, Receive, Send
from adapters.aws_lambda.events import principal
from adapters.aws_lambda.start import Boot


def make_handler() -> Any:
    """Build the service, start loading, and wrap the application. Raises SettingsError."""
    boot = Boot(os.environ)
    from mangum import Mangum

    from adapters.logs import configure
    from adapters.serving.asgi import create_app

    configure(boot.settings)
    # lifespan="off": Mangum would start and stop the application with every event.
    return Mangum(with_deadline(create_app(boot.service())), lifespan="off")


def with_deadline(app: App) -> App:
    """Tell the application what our own runtime tells it: the deadline, the request's id and who signed it."""

    async def wrapped(scope: Any, receive: Receive, send: Send) -> None:
        context = scope["aws.context"]
        deadline = time.monotonic() + context.get_remaining_time_in_millis() / 1000
        known = {
            "deadline": deadline,
            "id": context.aws_request_id,
            "direct": False,
            "principal": principal(scope["aws.event"]),
        }
        await app({**scope, "extensions": {"slm.request": known}}, receive, send)

    return wrapped
