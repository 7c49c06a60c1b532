"""Fill the gap between two texts, with a model that was trained for it. Code editors complete lines with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from msgspec.structs import replace

from core import session as sessions
from core.engine.interface import Engine, GenerationRequest
from core.engine.prompt import infill
from core.errors import NotSupported
from core.service import Service
from core.session import Session
from core.wire import fields
from core.wire import infill as wire
from core.wire.infill import Infill, InfillRequest


async def check(service: Service, request: InfillRequest) -> None:
    """Check what needs no loaded model: its name. Raises ModelNotFound."""
    sessions.check_model(service, request.model)


async def begin(service: Service, request: InfillRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start a request and wait for its first delta. The caller closes the Session.

    Raises NotSupported for a model without the tokens, and what `core.session.begin` raises.
    """
    limit = request.n_predict
    max_tokens = (service.settings.max_tokens or None) if limit is None or limit < 0 else limit

    def build(engine: Engine) -> GenerationRequest:
        return _generation_request(engine, request, max_tokens, tenant, ends)

    return await sessions.begin(service, request.model, build, ends)


def _generation_request(
    engine: Engine, request: InfillRequest, max_tokens: int | None, tenant: str, ends: float | None
) -> GenerationRequest:
    """Build the prompt that fits into the context. Blocks."""
    tokens = engine.card.infill
    if tokens is None:
        raise NotSupported(
            f"/infill needs a model with fill-in-the-middle tokens, and '{engine.card.name}' has none; serve a code "
            "model such as Qwen2.5-Coder."
        )
    sampling = fields.sampling(request, engine.card.n_vocab)
    if request.temperature is None:
        sampling = replace(sampling, temperature=wire.TEMPERATURE)
    files = [infill.File(file.filename, file.text) for file in request.input_extra or ()]
    before = request.input_prefix + (request.prompt or "")
    n_predict = engine.card.n_ctx if max_tokens is None else max_tokens
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return GenerationRequest(
        prompt=infill.window(engine, tokens, before, request.input_suffix, files, n_predict),
        sampling=sampling,
        max_tokens=max_tokens if max_tokens is None else max(1, max_tokens),  # the one token of 0 is not shown
        stop=tuple(stop),
        tenant=tenant,
        deadline=ends,
    )


async def complete(session: Session, request: InfillRequest) -> Infill | dict[str, Any]:
    """Return the whole answer: the fold of the stream. With `response_fields`, return these only."""
    events = [event async for event in stream(session, request)]
    last = events[-1]
    last.content = "".join(event.content for event in events)
    return last if request.response_fields is None else wire.chosen(last, request.response_fields)


async def stream(session: Session, request: InfillRequest) -> AsyncIterator[Infill]:
    """Yield the text as it is generated, and at the end an event with `stop` true and the figures."""
    model = session.card.name
    async for delta in session:
        content = "" if request.n_predict == 0 else delta.text
        if delta.finish_reason is None:
            if content:
                yield Infill(content, model, stop=False)
            continue
        yield wire.finished(
            content,
            model,
            prompt_tokens=session.prompt_tokens,
            cached_tokens=session.cached_tokens,
            generated=0 if request.n_predict == 0 else session.completion_tokens,
            finish_reason=delta.finish_reason,
            cause=delta.cause,
            stopping_word=delta.stop,
            times=session.timings,
        )
