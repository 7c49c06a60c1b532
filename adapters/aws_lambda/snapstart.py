"""SnapStart: what is done once before the snapshot, and in each process restored from it.

Protocol as in awslambdaric's `bootstrap.on_init_complete`: only when AWS_LAMBDA_INITIALIZATION_TYPE is `snap-start`.
Untried on AWS.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.aws_lambda.failure import Failure
from adapters.aws_lambda.runtime_api import RuntimeAPI
from core.errors import ApiError
from core.settings import SettingsError

if TYPE_CHECKING:
    from core.service import Service

logger = logging.getLogger(__name__)

EXIT_BEFORE_SNAPSHOT = 64
EXIT_AFTER_RESTORE = 65


@dataclass(frozen=True, slots=True)
class Hooks:
    """Work that belongs into the snapshot, and work that makes a restored process one of its own."""

    before: Callable[[], Awaitable[None]]
    after: Callable[[], Awaitable[None]]


def wanted(environ: Mapping[str, str]) -> bool:
    return environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"


async def take(api: RuntimeAPI, hooks: Hooks) -> int:
    """Prepare, be snapshot, come back restored. 0, or the exit status after the error has been told."""
    try:
        await hooks.before()
    except Exception as error:  # whatever it is, Lambda must be told before the process ends
        logger.error("The work before the snapshot failed.", exc_info=error)
        await api.init_error(Failure("Runtime.BeforeSnapshotError", f"Before the snapshot: {_told(error)}"))
        return EXIT_BEFORE_SNAPSHOT
    await api.restore_next()
    api.close()  # these connections are the snapshot's
    try:
        await hooks.after()
    except Exception as error:  # as above
        logger.error("The work after the restore failed.", exc_info=error)
        await api.restore_error(Failure("Runtime.AfterRestoreError", f"After the restore: {_told(error)}"))
        return EXIT_AFTER_RESTORE
    return 0


def _told(error: Exception) -> str:
    """Our own errors have words for it; another's name must do."""
    return str(error) if isinstance(error, ApiError | SettingsError) else f"{type(error).__name__}; see the log."


# One of each kind: between them they import, compile and build all that a first request would have to.
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

    Raises ModelUnavailable if the model does not come. A model that cannot chat still serves what it can.
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
    """Generators that would give every restored process the same numbers. `os.urandom` needs nothing: the kernel
    is reseeded by the platform."""
    import os

    random.seed()
    if ssl := sys.modules.get("ssl"):
        ssl.RAND_add(os.urandom(48), 48.0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
