"""The handler for a deployment under awslambdaric, Amazon's own Python runtime. Mangum wraps the same application.

awslambdaric does not stream from Python, so answers are buffered.
"""

from __future__ import annotations

import os
import time
from typing import Any

from adapters.aws_lambda.cycle import App, Receive, Send
from adapters.aws_lambda.events import principal
from adapters.aws_lambda.start import Start


def make_handler() -> Any:
    """Build the service, start loading the model, and wrap the application. Raises SettingsError."""
    start = Start(os.environ)
    from mangum import Mangum

    from adapters.logs import configure
    from adapters.serving.asgi import create_app

    configure(start.settings)
    # lifespan="off": Mangum would start and stop the application for every event.
    return Mangum(with_request_context(create_app(start.service())), lifespan="off")


def with_request_context(app: App) -> App:
    """Pass the deadline, the request id and the IAM principal to the application, as our own runtime does."""

    async def wrapped(scope: Any, receive: Receive, send: Send) -> None:
        context = scope["aws.context"]
        extension = {
            "deadline": time.monotonic() + context.get_remaining_time_in_millis() / 1000,
            "id": context.aws_request_id,
            "direct": False,
            "principal": principal(scope["aws.event"]),
        }
        await app({**scope, "extensions": {"slm.request": extension}}, receive, send)

    return wrapped
