"""`python -m adapters.aws_lambda`: the entry point of the container image."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from adapters.aws_lambda import prefetch
from core.errors import ApiError
from core.settings import SettingsError

if TYPE_CHECKING:
    from core.service import Service


def main() -> int:
    """Load, start, serve. The exit status tells Lambda nothing; what went wrong it is told through `/init/error`."""
    if "AWS_LAMBDA_RUNTIME_API" not in os.environ:
        sys.stderr.write(
            "AWS_LAMBDA_RUNTIME_API is not set: this is the entry point for AWS Lambda and its emulators.\n"
            "To serve on this machine: python -m adapters.local; to try Lambda here: make url.\n"
        )
        return 2
    try:
        return _serve()
    except SettingsError as error:
        return _refuse("Runtime.SettingsError", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, Lambda must be told, else it only sees a process end
        traceback.print_exc()
        return _refuse("Runtime.InitFailed", f"The start failed with {type(error).__name__}; the log has the reason.")


def _serve() -> int:
    prefetch.begin(os.environ)
    from adapters.aws_lambda.start import Boot  # before asyncio and the web framework: it starts the load

    boot = Boot(os.environ)
    with boot.timeline.phase("imports"):
        import asyncio

        from adapters.aws_lambda import runtime as loop
        from adapters.aws_lambda import snapstart
        from adapters.logs import configure
        from adapters.serving.asgi import Endpoint

        # The first request needs these, at a time when the CPU may be down to the memory's share. Here they cost
        # nothing: the tensors load in C, without the interpreter's lock.
        from core.engine.prompt import sandbox as jinja  # noqa: F401
        from handlers import chat, extract  # noqa: F401
    configure(boot.settings)
    service = boot.service()

    kept: list[asyncio.Future[None]] = []  # the loop holds its tasks weakly

    async def settle() -> None:
        await service.host.wait_ready(float("inf"))
        report(service)

    async def ready() -> None:
        """An event that waits already (on-demand) is taken while the last tensors arrive: parsing it, its template and
        its tokens need none. Where none waits, the environment would be frozen amid the download."""
        settling = asyncio.ensure_future(settle())
        kept.append(settling)
        if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand") == "on-demand":
            with contextlib.suppress(ApiError):
                (await service.host.lease()).release()
        else:
            await settling
            if not snapstart.wanted(os.environ):  # whose hook does it, and fails if the model does
                with contextlib.suppress(ApiError):
                    await snapstart.prime(service, init_ends)

    async def before() -> None:
        await snapstart.prime(service, init_ends)

    async def after() -> None:
        boot.timeline.restart()
        with boot.timeline.phase("restore"):
            found = await asyncio.to_thread(boot.read_secret)
            snapstart.reseed()
        runtime.app = Endpoint(boot.with_keys(found))
        report(service)

    init_ends = time.monotonic() - boot.timeline.now() + loop.init_seconds(os.environ, boot.settings.function_timeout_s)
    runtime = loop.Runtime(
        Endpoint(service),
        os.environ,
        mode=service.settings.response_mode,
        ready=ready,
        init_ends=init_ends,
        concurrency=max(1, int(os.environ.get("AWS_LAMBDA_MAX_CONCURRENCY") or 1)),
        hooks=snapstart.Hooks(before, after),
        afterwards=service.store.idle if service.settings.s3_bucket else None,
    )
    return asyncio.run(runtime.run())


def report(service: Service) -> None:
    """The cold start as one log line."""
    import logging

    state = service.host.state()
    logging.getLogger(__name__).info(
        "Cold start: %s after %.0f ms.",
        state.status,
        service.timeline.now() * 1e3,
        extra={"fields": {"model": state.model, "error": state.error, "timeline": service.timeline.report()}},
    )


def _refuse(kind: str, message: str) -> int:
    """Tell Lambda why there will be no service."""
    import asyncio

    from adapters.aws_lambda.failure import Failure
    from adapters.aws_lambda.runtime_api import RuntimeAPI, RuntimeGone

    async def tell() -> None:
        api = RuntimeAPI(os.environ["AWS_LAMBDA_RUNTIME_API"])
        try:
            await api.init_error(Failure(kind, message))
        finally:
            api.close()

    sys.stderr.write(message + "\n")
    try:
        asyncio.run(tell())
    except RuntimeGone as error:
        sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    # Not sys.exit: a load under way in a thread must not keep Lambda waiting for a process that has given up.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
