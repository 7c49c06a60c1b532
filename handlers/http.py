"""Request and Response: the two plain values every adapter translates to and from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Request:
    """One call, whole: the adapter has read (and bounded) the body.

    `headers` has lower-case names, repeated ones joined with ", ". `query` keeps the last of repeated keys.
    `deadline` is on `time.monotonic()`'s clock: the answer must be complete by then. `client` is the peer's address,
    None where the platform hides it. `direct` is a direct invoke of the function, which IAM has let through.
    `principal` is the ARN of the IAM identity that signed an HTTP request, if the platform names one.
    """

    method: str
    path: str
    id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client: str | None = None
    deadline: float | None = None
    http_version: str = "1.1"
    direct: bool = False
    principal: str | None = None


async def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Response:
    """Status, headers and a body: whole, or chunks as they come.

    Whoever sends a Response calls `aclose()` in a `finally`, sent or not: a generator's own `finally` may never run
    once a framework has dropped it, so what a stream holds (a lease on the model, a running generation) hangs here.
    `aclose()` may be called more than once.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | AsyncIterator[bytes] = b""
    aclose: Callable[[], Awaitable[None]] = _nothing
