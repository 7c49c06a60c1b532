"""Session: a caller's hold on the model, from the lease to the last piece. Chat and extract both run on it.

Knows no OpenAI shapes and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from core.engine.interface import Delta, Engine, EngineConfig, Generation, GenerationRequest, ModelCard
from core.errors import ModelNotFound
from core.lending import Lease
from core.service import Service
from core.settings import Settings

T = TypeVar("T")


def check_model(service: Service, name: str | None) -> None:
    """Raise ModelNotFound unless `name` is the served model, an alias of it, or left out.

    What is served may change until the request has its engine; `begin` checks again then.
    """
    _check_name(service, name, service.host.state().model)


def _check_name(service: Service, name: str | None, served: str | None) -> None:
    if name is None:
        return
    aliases = service.settings.model_aliases
    if name == served or name in aliases or "*" in aliases:
        return
    names = ", ".join(repr(known) for known in ((served,) if served else ()) + aliases)
    hint = f"use {names}, or leave 'model' out" if names else "no model is configured"
    raise ModelNotFound(f"The model {name[:100]!r} does not exist here; {hint}.", param="model")


def deadline(settings: Settings, platform: float | None) -> float | None:
    """When an answer has to end, on `time.monotonic()`'s clock: a margin before the platform's own deadline, or
    REQUEST_TIMEOUT_S from now; the earlier of the two."""
    ends = [] if platform is None else [platform - settings.deadline_margin_s]
    if settings.request_timeout_s:
        ends.append(time.monotonic() + settings.request_timeout_s)
    return min(ends, default=None)


class Session:
    """A running generation whose first piece is there. Close it when done, finished or not."""

    def __init__(self, lease: Lease, generation: Generation, first: Delta, prompt_tokens: int) -> None:
        self._lease = lease
        self._generation = generation
        self._first = first
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0  # so far

    @property
    def card(self) -> ModelCard:
        return self._lease.engine.card

    @property
    def config(self) -> EngineConfig:
        return self._lease.engine.config

    @property
    def cached_tokens(self) -> int:
        return self._generation.cached_tokens

    async def pieces(self) -> AsyncIterator[Delta]:
        """Every piece, once. It may be dropped half-way: `close` frees what runs.

        The engine goes back with the last piece: a client that is slow to read holds no model that is swapped out.
        """
        try:
            self.completion_tokens += self._first.tokens
            yield self._first
            async for piece in self._generation:
                self.completion_tokens += piece.tokens
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Stop generating and give the model back. Idempotent."""
        self._generation.cancel()
        self._lease.release()


async def begin(
    service: Service, model: str | None, build: Callable[[Engine], GenerationRequest], ends: float | None
) -> Session:
    """Lease the model, build the request in a worker thread and wait for the first piece, so that what is wrong with
    a request is known while a status can still say so.

    `model` is the name that the client asked for: while the request waited, another model may have taken its place.
    Raises what the lease, `build` and the engine raise: ModelUnavailable, ModelNotFound, InvalidRequest,
    ContextOverflow, Busy; DeadlineExceeded if there is no token when the time is up.
    """
    lease = await service.host.lease(ends)
    generation: Generation | None = None
    try:
        _check_name(service, model, lease.engine.card.name)
        request = await _in_thread(lease, build)
        generation = lease.engine.generate(request)
        first = await anext(aiter(generation))
    except BaseException:
        if generation is not None:
            generation.cancel()
        lease.release()
        raise
    return Session(lease, generation, first, len(request.prompt))


async def _in_thread(lease: Lease, build: Callable[[Engine], T]) -> T:
    """Run `build` in a worker thread. If the caller is cancelled meanwhile, the thread still uses the engine: hold the
    lease until it has ended, or a swapped-out model would be freed under it."""
    held = asyncio.get_running_loop().run_in_executor(None, build, lease.engine)
    try:
        return await asyncio.shield(held)
    except asyncio.CancelledError:
        while not held.done():
            try:
                await asyncio.wait({held})
            except asyncio.CancelledError:
                continue
        held.exception()  # seen, or asyncio complains that nobody looked
        raise
