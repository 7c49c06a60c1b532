"""POST /v1/chat/completions and POST /v1/extract: generate with the model, and reply with one JSON body or a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from core import chat, extract
from core.extract import ExtractRequest
from core.service import Service
from core.session import Session, deadline
from core.wire.chat import ChatRequest
from handlers import sse
from handlers.auth import tenant
from handlers.http import Request, Response, add_log_fields, decode, json_response

GRACE_S = 0.5  # while the model loads: how long a stream waits for a load that fails at once
PATIENCE_S = 3.0  # while the model is ready: how long a stream waits for the first token before it sends its status
WAITING_S = 1.0  # between two comments until the first token


class Body(Protocol):
    """A request body of an operation."""

    stream: bool | None


B = TypeVar("B", bound=Body)
C = TypeVar("C", contravariant=True)


class Operation(Protocol[C]):
    """The interface that `core.chat` and `core.extract` share."""

    async def check(self, service: Service, request: C) -> None: ...

    async def begin(self, service: Service, request: C, *, tenant: str = "", ends: float | None = None) -> Session: ...

    async def complete(self, session: Session, request: C) -> Any: ...

    def stream(self, session: Session, request: C) -> AsyncIterator[Any]: ...


async def post_chat(service: Service, request: Request) -> Response:
    """Return OpenAI's chat completion, as one body or as chunks."""
    return await respond(service, request, ChatRequest, chat)


async def post_extract(service: Service, request: Request) -> Response:
    """Extract JSON from a text. A stream has `extraction.delta` events, then the `extraction`."""
    return await respond(service, request, ExtractRequest, extract)


async def respond(
    service: Service,
    request: Request,
    kind: type[B],
    operation: Operation[B],
    framing: Callable[[], sse.Framing] = sse.Framing,
) -> Response:
    """Run `operation` on a body of type `kind`; stream its events if the body says `"stream": true`.

    A stream's status waits for the first token, so that an invalid request gets a 4xx, but only for a few seconds.
    While the model loads, or the request is queued or in prefill, the 200 is sent early and comments follow, because
    clients and proxies give up on a silent server. Errors after that are `error` events.
    """
    body = decode(request, kind)
    await operation.check(service, body)
    ends = deadline(service.settings, request.deadline)

    def begin() -> Awaitable[Session]:
        return operation.begin(service, body, tenant=tenant(service, request), ends=ends)

    if body.stream:
        session: Session | None = None

        async def produce(send: sse.Send) -> None:
            nonlocal session
            session = await begin()
            try:
                async for event in operation.stream(session, body):
                    send(event)
            finally:
                _close(session)

        return await sse.stream(
            produce,
            patience_s=PATIENCE_S if service.host.state().status == "ready" else GRACE_S,
            silence=lambda: _silence(service),
            headers=lambda: () if session is None else _server_timing(session, decode=False),
            framing=framing(),
        )
    session = await begin()
    try:
        completion = await operation.complete(session, body)
        return json_response(completion, headers=_server_timing(session, decode=True))
    finally:
        _close(session)


def _silence(service: Service) -> tuple[float, str]:
    """Return the seconds between comments until the first token, and a comment that says why the client waits."""
    state = service.host.state()
    if state.status == "ready":
        return WAITING_S, "waiting"
    percent = state.loading.percent if state.loading else None
    return WAITING_S, "loading" if percent is None else f"loading {percent}%"


def _server_timing(session: Session, *, decode: bool) -> tuple[tuple[str, str], ...]:
    """Return a server-timing header with the times that are final when the headers are sent, in milliseconds."""
    timings = session.timings
    entries = [f"queue;dur={timings.queue_ms:.1f}", f"prefill;dur={timings.prefill_ms:.1f}"]
    if decode:
        entries.append(f"decode;dur={timings.decode_ms:.1f}")
    return (("server-timing", ", ".join(entries)),)


def _close(session: Session) -> None:
    session.close()
    measured = session.measured
    assert measured is not None
    fields: dict[str, object] = {
        "model": measured.model,
        "prompt_tokens": measured.prompt_tokens,
        "cached_tokens": measured.cached_tokens,
        "completion_tokens": measured.completion_tokens,
        "reasoning_tokens": session.reasoning_tokens,
        "finish_reason": measured.finish_reason,
        "latency_ms": round(measured.latency_s * 1000, 1),
        "first_token_ms": round(measured.first_token_s * 1000, 1),
        "queue_ms": round(measured.queue_s * 1000, 1),
        "prefill_ms": round(measured.prefill_s * 1000, 1),
        "decode_ms": round(measured.decode_s * 1000, 1),
    }
    if session.cause is not None:
        fields["finish_cause"] = session.cause
    add_log_fields(**fields)
