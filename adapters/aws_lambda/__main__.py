"""The entry point of the container image: `python -m adapters.aws_lambda`."""

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
    """Start, load and serve. Return the exit status; Lambda gets the reason of a failure through `/init/error`."""
    if "AWS_LAMBDA_RUNTIME_API" not in os.environ:
        sys.stderr.write(
            "AWS_LAMBDA_RUNTIME_API is not set. This is the entry point for AWS Lambda and its emulators.\n"
            "To serve on this machine, run python -m adapters.local. To try Lambda on this machine, run make url.\n"
        )
        return 2
    try:
        return _serve()
    except SettingsError as error:
        return _report_failure("Runtime.SettingsError", str(error))
    except Exception as error:  # noqa: BLE001 - without a report Lambda would only see that the process ended
        traceback.print_exc()
        message = f"The start failed with {type(error).__name__}. The reason is in the log."
        return _report_failure("Runtime.InitFailed", message)


def _serve() -> int:
    # 1) Read the model in the image into the page cache.
    prefetch.begin(os.environ)
    # 2) Read the settings and start loading the model, before asyncio and the application are imported.
    from adapters.aws_lambda.start import Start

    start = Start(os.environ)
    # 3) Import everything else while the tensors load. They load in C, without the interpreter lock.
    with start.timeline.phase("imports"):
        import asyncio

        from adapters.aws_lambda import runtime, snapstart
        from adapters.logs import configure
        from adapters.serving.asgi import Endpoint

        # The first request needs these. Later the CPU may be down to the share that the memory size buys.
        from core.engine.prompt import sandbox  # noqa: F401
        from handlers import generate  # noqa: F401
    configure(start.settings)
    service = start.service()

    tasks: list[asyncio.Future[None]] = []  # the event loop only holds weak references

    async def settle() -> None:
        await service.host.wait_ready(float("inf"))
        log_cold_start(service)

    async def ready() -> None:
        """Return when the first event may be taken.

        On demand an event is already waiting. It is taken while the last tensors arrive, because parsing it and
        rendering and tokenizing its prompt need none of them. In the other cases no event waits, and Lambda would
        freeze the process mid-download.
        """
        settling = asyncio.ensure_future(settle())
        tasks.append(settling)
        if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand") == "on-demand":
            with contextlib.suppress(ApiError):
                (await service.host.lease()).release()
        else:
            await settling
            if not snapstart.enabled(os.environ):  # SnapStart's hook primes, and fails if the model does
                with contextlib.suppress(ApiError):
                    await snapstart.prime(service, init_ends)

    async def before_snapshot() -> None:
        await snapstart.prime(service, init_ends)

    async def after_restore() -> None:
        start.timeline.restart()
        with start.timeline.phase("restore"):
            secret = await asyncio.to_thread(start.read_secret)
            snapstart.reseed()
        loop.app = Endpoint(start.with_keys(secret))
        log_cold_start(service)

    # 4) Serve.
    init_s = runtime.init_seconds(os.environ, start.settings.function_timeout_s)
    init_ends = time.monotonic() - start.timeline.now() + init_s
    loop = runtime.Runtime(
        Endpoint(service),
        os.environ,
        mode=service.settings.response_mode,
        ready=ready,
        init_ends=init_ends,
        concurrency=max(1, int(os.environ.get("AWS_LAMBDA_MAX_CONCURRENCY") or 1)),
        hooks=snapstart.Hooks(before_snapshot, after_restore),
        afterwards=service.store.idle if service.settings.s3_bucket else None,
        close=lambda: service.close(service.settings.shutdown_grace_s),
    )
    return asyncio.run(loop.run())


def log_cold_start(service: Service) -> None:
    """Log the phases of the cold start in one line."""
    import logging

    state = service.host.state()
    logging.getLogger("slm.lambda").info(
        "Cold start: %s after %.0f ms.",
        state.status,
        service.timeline.now() * 1e3,
        extra={"fields": {"model": state.model, "error": state.error, "timeline": service.timeline.report()}},
    )


def _report_failure(kind: str, message: str) -> int:
    """Report to Lambda why the start failed."""
    import asyncio

    from adapters.aws_lambda.answer import Failure
    from adapters.aws_lambda.runtime_api import RuntimeAPI, RuntimeGone

    async def post() -> None:
        api = RuntimeAPI(os.environ["AWS_LAMBDA_RUNTIME_API"])
        try:
            await api.init_error(Failure(kind, message))
        finally:
            api.close()

    sys.stderr.write(message + "\n")
    try:
        asyncio.run(post())
    except RuntimeGone as error:
        sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    # sys.exit would wait for a thread that is still loading.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
