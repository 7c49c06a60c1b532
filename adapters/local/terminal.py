"""Write the banner to the terminal, and a progress line while a model is loading."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from core.engine.interface import LoadedEngine
from core.health import hint
from core.host import HostState
from core.settings import Settings

CLEAR = "\r\x1b[K"  # back to the first column, erase the line


def banner(address: str, settings: Settings, state: HostState[LoadedEngine], version: str) -> str:
    """Return the first lines: the address, the model with its state, and a request to try."""
    lines = [f"slm-api-server {version} on {address}"]
    if state.model is None:
        lines.append(f"Model: none ({state.status})" + (f". Error: {state.error}" if state.error else ""))
        lines.append(hint(state))
    else:
        status = "loads with the first request" if state.status == "available" else state.status
        lines.append(f"Model: {state.model} ({status})" + (f". Error: {state.error}" if state.error else ""))
        body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32})
        key = " -H 'authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
        lines.append(f"Try: curl {address}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'")
    return "\n".join(lines)


class ProgressLine(threading.Thread):
    """Show the progress of a load in one line that is redrawn. For terminals only; elsewhere the log has it.

    A thread, because a load may start in any request and must not depend on the server's event loop.
    """

    def __init__(self, state: Callable[[], HostState[LoadedEngine]], stream: TextIO | None = None) -> None:
        super().__init__(name="progress", daemon=True)
        self._state = state
        self._stream = stream or sys.stderr
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._drawn = False

    def run(self) -> None:
        began: float | None = None
        while not self._stopped.wait(0.2):
            state = self._state()
            if state.loading is not None:
                began = began or time.monotonic()
                loading = state.loading
                self._draw(f"{loading.phase} {loading.model}{amount(loading.done, loading.total)}", end="")
            elif began is not None:
                outcome = state.error or f"{state.model} is {state.status}"
                self._draw(f"{outcome} after {time.monotonic() - began:.1f} s", end="\n")
                began = None

    def stop(self) -> None:
        self._stopped.set()

    def keep_clear_of(self, handler: logging.Handler) -> None:
        """Erase the line before `handler` writes, so that a log line does not continue it."""
        handler.addFilter(self._erase)

    def _erase(self, record: logging.LogRecord) -> bool:
        with self._lock:
            if self._drawn:
                self._stream.write(CLEAR)
                self._stream.flush()
                self._drawn = False
        return True

    def _draw(self, text: str, *, end: str) -> None:
        with self._lock:
            self._stream.write(f"{CLEAR}{text}{end}")
            self._stream.flush()
            self._drawn = not end


def amount(done: int, total: int) -> str:
    """Return the percentage and size of a transfer, with a leading space. An unknown `total` is 0."""
    if total == 0:
        return " …"
    return f" {done * 100 // total} % ({done / 1e6:.0f} of {total / 1e6:.0f} MB)"
