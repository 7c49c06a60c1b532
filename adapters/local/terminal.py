"""Terminal: what a person who starts the server sees first, and the progress of what takes long."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from core.health import hint
from core.host import HostState
from core.settings import Settings


def banner(address: str, settings: Settings, state: HostState, version: str) -> str:
    """The first lines: the address, the model and its state, and one command to try."""
    model = state.model or "no model"
    body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32})
    key = " -H 'authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    lines = [
        f"slm-api-server {version} on {address}",
        f"model: {model} ({state.status})" + (f", error: {state.error}" if state.error else ""),
    ]
    if state.model is None:
        lines.append(hint(state))
    else:
        lines.append(f"try: curl {address}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'")
    return "\n".join(lines)


class ProgressLine(threading.Thread):
    """While a model is loading, one line that is rewritten; only in a terminal (elsewhere the log tells).

    A thread, because a load may begin in a request and the server's loop has better things to do.
    """

    def __init__(self, state: Callable[[], HostState], stream: TextIO | None = None) -> None:
        super().__init__(name="progress", daemon=True)
        self._state = state
        self._stream = stream or sys.stderr
        self._done = threading.Event()

    def run(self) -> None:
        shown, began = False, 0.0
        while not self._done.wait(0.2):
            loading = self._state().loading
            if loading is not None:
                began = began if shown else time.monotonic()
                shown = True
                self._write(f"\r\x1b[K{loading.phase} {loading.model}{_amount(loading.done, loading.total)}")
            elif shown:
                shown = False
                state = self._state()
                told = state.error or f"{state.model} is {state.status}"
                self._write(f"\r\x1b[K{told} after {time.monotonic() - began:.1f} s\n")

    def stop(self) -> None:
        self._done.set()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _amount(done: int, total: int) -> str:
    if total == 0:
        return " …"
    return f" {done * 100 // total} % ({done / 1e6:.0f} of {total / 1e6:.0f} MB)"
