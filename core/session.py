"""A session: one request's hold on the model, from its lease to the last delta. Chat and extract run on it.

It uses no OpenAI shapes and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
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
from core.errors import ModelNotFound
from core.lending import Lease
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
    raise ModelNotFound(f"The model {name[:100]!r} does not exist here; {hint}.", param="model")


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

    def __init__(self, lease: Lease, generation: Generation, first: Delta, prompt_tokens: int) -> None:
        self._lease = lease
        self._generation = generation
        self._first: Delta | None = first
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0  # so far
        self.finish_reason: FinishReason | None = None  # "length" if any of the n sequences was cut
        self.cause: Cause | None = None

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
            except BaseException:
                self.close()
                raise
        self.completion_tokens += delta.tokens
        if delta.finish_reason is not None and self.finish_reason != "length":
            self.finish_reason, self.cause = delta.finish_reason, delta.cause
        return delta

    def close(self) -> None:
        """Stop generating and release the model. Idempotent."""
        self._generation.cancel()
        self._lease.release()


async def begin(
    service: Service, model: str | None, build: Callable[[Engine], GenerationRequest], ends: float | None
) -> Session:
    """Lease the model, build the request in a worker thread and wait for the first delta.

    Most errors therefore occur before a status is chosen. `model` is the name in the request; it is checked again
    because another model may have been swapped in meanwhile. Raises what the lease, `build` and the engine raise:
    ModelUnavailable, ModelNotFound, InvalidRequest, ContextOverflow, Busy, and DeadlineExceeded without a first token
    at the deadline.
    """
    lease = await service.host.lease(ends)
    generation: Generation | None = None
    try:
        _check_name(service, model, lease.engine.card.name)
        request = await _in_thread(lease, build)
        generation = lease.engine.generate(request)
        first = await anext(generation)
    except BaseException:
        if generation is not None:
            generation.cancel()
        lease.release()
        raise
    return Session(lease, generation, first, len(request.prompt))


async def _in_thread(lease: Lease, build: Callable[[Engine], T]) -> T:
    """Run `build` in a worker thread and keep the lease until that thread is done.

    A cancelled caller waits for the thread too: it still uses the engine, which a swap could otherwise free.
    """
    result = asyncio.get_running_loop().run_in_executor(None, build, lease.engine)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        while not result.done():
            try:
                await asyncio.wait({result})
            except asyncio.CancelledError:
                continue
        result.exception()  # mark it as retrieved, so that asyncio does not log it
        raise
