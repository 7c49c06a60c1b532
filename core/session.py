"""A session: one request's hold on the model, from its lease to the last delta. Chat and extract run on it.

It uses no OpenAI shapes and no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from core.engine.interface import (
    Cause,
    Delta,
    Engine,
    EngineConfig,
    FinishReason,
    Generation,
    GenerationRequest,
    ModelCard,
    Timings,
)
from core.errors import ApiError, ModelNotFound
from core.generations import Generations
from core.lending import Lease, in_thread
from core.metrics import FinishedRequest, Metrics, error_code
from core.service import Service
from core.settings import Settings

T = TypeVar("T")


def check_model(service: Service, name: str | None) -> None:
    """Raise ModelNotFound unless `name` is None, the served model or an alias of it.

    The served model may change until the request has its engine, so `begin` checks again.
    """
    _check_name(service, name, service.host.state().model)


def _check_name(service: Service, name: str | None, served: str | None) -> None:
    if name is None:
        return
    aliases = service.settings.model_aliases
    if name == served or name in aliases or "*" in aliases:
        return
    names = ", ".join(repr(allowed) for allowed in ((served,) if served else ()) + aliases)
    hint = f"use {names}, or leave 'model' out" if names else "no model is configured"
    what = "does not exist here"
    embedder = service.embedder
    if embedder is not None and name in (embedder.state().model, *service.settings.embedding_model_aliases):
        what = "is the embedding model (POST /v1/embeddings)"
    raise ModelNotFound(f"The model {name[:100]!r} {what}; {hint}.", param="model")


def deadline(settings: Settings, platform: float | None) -> float | None:
    """Return when the response has to be complete, on the clock of `time.monotonic()`.

    It is DEADLINE_MARGIN_S before the platform's deadline or REQUEST_TIMEOUT_S from now, whichever is earlier.
    """
    ends = [] if platform is None else [platform - settings.deadline_margin_s]
    if settings.request_timeout_s:
        ends.append(time.monotonic() + settings.request_timeout_s)
    return min(ends, default=None)


class Session:
    """A running generation whose first delta has arrived. Iterate over its deltas once, and always `close` it.

    The lease is released with the last delta, so a slow client does not keep a swapped-out model in memory.
    """

    def __init__(
        self,
        lease: Lease[Engine],
        generation: Generation,
        first: Delta,
        requests: Sequence[GenerationRequest],
        metrics: Metrics,
        began: float,
    ) -> None:
        self._lease = lease
        self._generation = generation
        self._first: Delta | None = first
        self._unfinished = sum(request.n for request in requests)
        self._metrics = metrics
        self._began = began
        self._first_token_s = time.monotonic() - began
        self._error: ApiError | None = None
        self.measured: FinishedRequest | None = None  # once it is closed
        self.requests = requests  # more than one if the client sent several prompts
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.completion_tokens = 0  # so far
        self.reasoning_tokens = 0  # of them
        self.finish_reason: FinishReason | None = None  # "length" if any of the n sequences was cut
        self.cause: Cause | None = None

    @property
    def engine(self) -> Engine:
        """The engine. It may be closed after the last delta."""
        return self._lease.engine

    @property
    def card(self) -> ModelCard:
        return self._lease.engine.card

    @property
    def config(self) -> EngineConfig:
        return self._lease.engine.config

    @property
    def cached_tokens(self) -> int:
        return self._generation.cached_tokens

    @property
    def timings(self) -> Timings:
        return self._generation.timings

    def __aiter__(self) -> Session:
        return self

    async def __anext__(self) -> Delta:
        delta, self._first = self._first, None
        if delta is None:
            try:
                delta = await anext(self._generation)
            except BaseException as error:
                self._error = error if isinstance(error, ApiError) else None
                self.close()
                raise
        self.completion_tokens += delta.tokens
        self.reasoning_tokens += delta.reasoning_tokens
        if delta.finish_reason is not None:
            self._unfinished -= 1
            if self.finish_reason != "length":
                self.finish_reason, self.cause = delta.finish_reason, delta.cause
        return delta

    def close(self) -> None:
        """Stop generating, release the model and count the request. Idempotent."""
        self._generation.cancel()
        self._lease.release()
        if self.measured is None:
            self.measured = self._measure()
            self._metrics.finished(self.measured)
            if self._error is not None:
                self._metrics.failed(self.card.name, error_code(self._error))

    def _measure(self) -> FinishedRequest:
        timings = self.timings
        if self._error is not None:
            reason = "error"
        else:
            reason = self.finish_reason if self.finish_reason and not self._unfinished else "abort"
        return FinishedRequest(
            model=self.card.name,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            first_token_s=self._first_token_s,
            latency_s=time.monotonic() - self._began,
            queue_s=timings.queue_ms / 1000,
            prefill_s=timings.prefill_ms / 1000,
            decode_s=timings.decode_ms / 1000,
            token_intervals=self._generation.token_intervals,
        )


async def borrow(service: Service, model: str | None, work: Callable[[Engine], T], ends: float | None = None) -> T:
    """Lease the model and return what `work` makes with it in a worker thread. Needs no slot.

    Raises what the lease and `work` raise: ModelUnavailable, ModelNotFound, InvalidRequest.
    """
    check_model(service, model)
    lease = await service.host.lease(ends)
    try:
        _check_name(service, model, lease.engine.card.name)
        return await in_thread(lease, work)
    finally:
        lease.release()


async def begin(
    service: Service, model: str | None, build: Callable[[Engine], GenerationRequest], ends: float | None
) -> Session:
    """Begin a session of one request, as `begin_all` does."""
    return await begin_all(service, model, lambda engine: (build(engine),), ends)


async def begin_all(
    service: Service, model: str | None, build: Callable[[Engine], Sequence[GenerationRequest]], ends: float | None
) -> Session:
    """Lease the model, build the requests in a worker thread, run them and wait for the first delta.

    All requests have the same `n`. In the deltas, sequence `j` of request `i` has the index `i * n + j`.

    Most errors therefore occur before a status is chosen. `model` is the name in the request; it is checked again
    because another model may have been swapped in meanwhile. Raises what the lease, `build` and the engine raise:
    ModelUnavailable, ModelNotFound, InvalidRequest, ContextOverflow, Busy, and DeadlineExceeded without a first token
    at the deadline.
    """
    began = time.monotonic()
    lease: Lease[Engine] | None = None
    generation: Generation | None = None
    try:
        lease = await service.host.lease(ends)
        _check_name(service, model, lease.engine.card.name)
        requests = await in_thread(lease, build)
        generation = lease.engine.generate(requests[0]) if len(requests) == 1 else Generations(lease.engine, requests)
        first = await anext(generation)
    except BaseException as error:
        if generation is not None:
            generation.cancel()
        served = service.host.state().model if lease is None else lease.engine.card.name
        if lease is not None:
            lease.release()
        service.metrics.failed(served or "", error_code(error))
        raise
    return Session(lease, generation, first, requests, service.metrics, began)
