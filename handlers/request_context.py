"""What is remembered of a request while it runs: its id, and facts for its line in the access log."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")

# What the platform calls this request, for each log line: `requestId`, `xray_trace_id`. None outside a platform.
platform: ContextVar[dict[str, str] | None] = ContextVar("platform", default=None)

_facts: ContextVar[dict[str, object] | None] = ContextVar("facts", default=None)

# A caller's id is echoed into headers and logs: only what can neither break a line nor fill a disk.
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")


def identify(given: str | None) -> str:
    """The caller's id if it is sane, else a fresh one."""
    if given is not None and _SANE.fullmatch(given):
        return given
    return "req_" + os.urandom(12).hex()


def open_facts() -> dict[str, object]:
    """Start collecting for one request; call it in the task that will run `dispatch` and send the answer."""
    facts: dict[str, object] = {}
    _facts.set(facts)
    return facts


def note(**facts: object) -> None:
    """Add to this request's access-log line, e.g. `note(model=..., prompt_tokens=..., completion_tokens=...)`.

    Works from the handler and from the body of a stream. Never a secret, never a client's text.
    """
    collected = _facts.get()
    if collected is not None:
        collected.update(facts)
