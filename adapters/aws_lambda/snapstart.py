"""SnapStart: the work before the snapshot, and the work in each process restored from it.

The protocol is awslambdaric's `bootstrap.on_init_complete`. It applies only if AWS_LAMBDA_INITIALIZATION_TYPE is
`snap-start`. Not yet tested on AWS.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.aws_lambda.answer import Failure
from adapters.aws_lambda.runtime_api import RuntimeAPI
from core.errors import ApiError
from core.settings import SettingsError

if TYPE_CHECKING:
    from core.service import Service

logger = logging.getLogger("slm.lambda")

EXIT_BEFORE_SNAPSHOT = 64
EXIT_AFTER_RESTORE = 65


@dataclass(frozen=True, slots=True)
class Hooks:
    """`before` is work whose result the snapshot keeps. `after` renews what restored processes must not share."""

    before: Callable[[], Awaitable[None]]
    after: Callable[[], Awaitable[None]]


def enabled(environ: Mapping[str, str]) -> bool:
    return environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"


async def take(api: RuntimeAPI, hooks: Hooks) -> int:
    """Prepare, wait for the snapshot, and renew the restored process. Return 0, or the exit status after an error."""
    try:
        await hooks.before()
    except Exception as error:  # the process ends, and Lambda needs the reason
        logger.error("The work before the snapshot failed.", exc_info=error)
        await api.init_error(Failure("Runtime.BeforeSnapshotError", f"Before the snapshot: {_message(error)}"))
        return EXIT_BEFORE_SNAPSHOT
    await api.restore_next()
    api.close()  # their sockets belong to the process that was snapshot
    try:
        await hooks.after()
    except Exception as error:  # as above
        logger.error("The work after the restore failed.", exc_info=error)
        await api.restore_error(Failure("Runtime.AfterRestoreError", f"After the restore: {_message(error)}"))
        return EXIT_AFTER_RESTORE
    return 0


def _message(error: Exception) -> str:
    """Return the message of our own errors, the class name of others."""
    return str(error) if isinstance(error, ApiError | SettingsError) else f"{type(error).__name__}; see the log."


# One request of each kind. Together they import, compile and build what a first request needs.
_PRIMERS: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"Hello"}],"max_tokens":1}'),
    (
        "/v1/extract",
        b'{"text":"It is true.","max_tokens":8,'
        b'"schema":{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}}',
    ),
)


async def prime(service: Service, deadline: float) -> None:
    """Wait for the model until `deadline` (monotonic), then answer one chat and one extraction, so that weights,
    buffers, the compiled template and the grammar tokenizer are in memory.

    Raises ModelUnavailable if the model is not ready in time. A failed request is only logged: a model that cannot chat
    may still extract.
    """
    from handlers.dispatch import dispatch
    from handlers.http import Request

    (await service.host.lease(deadline)).release()
    for path, body in _PRIMERS:
        headers = {"content-type": "application/json"}
        request = Request("POST", path, id="prime", headers=headers, body=body, deadline=deadline, direct=True)
        response = await dispatch(service, request)
        await response.aclose()
        if response.status >= 400:
            logger.warning("Priming %s ended with status %d.", path, response.status)


def reseed() -> None:
    """Reseed the generators that would give every restored process the same numbers.

    `os.urandom` needs no care: the platform reseeds the kernel.
    """
    import os

    random.seed()
    if ssl := sys.modules.get("ssl"):
        ssl.RAND_add(os.urandom(48), 48.0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
