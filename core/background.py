"""Background: a thread of its own for work that takes minutes.

asyncio's default executor has six threads on two CPUs, and every prompt is built in one of them: work that keeps such a
thread for long stops all answers.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(name: str, function: Callable[[], T]) -> Future[T]:
    """Run `function` in a thread. The future cannot be cancelled: a caller that gives up leaves the thread at work."""
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
