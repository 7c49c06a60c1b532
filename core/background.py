"""Run work that takes minutes in a thread of its own.

asyncio's default executor has six threads on two CPUs, and every prompt is built in one of them. Long work there would
block all requests.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(name: str, function: Callable[[], T]) -> Future[T]:
    """Run `function` in a new thread. The future cannot be cancelled: the thread continues if the caller gives up."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()  # the request's id, for the log

    def run() -> None:
        try:
            result = context.run(function)
        except BaseException as error:  # noqa: BLE001 - raised where the future is awaited
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
