"""Fakes for tests: an engine that follows a script and a host that lends it. No model, no threads."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from core.downloads import Downloads
from core.engine.interface import (
    CallEnd,
    Cause,
    Delta,
    EngineConfig,
    Event,
    FinishReason,
    GenerationRequest,
    InfillTokens,
    ModelCard,
    Pooling,
    Reasoning,
    Text,
    Timings,
    Vector,
)
from core.errors import ApiError, Busy, ContextOverflow, InvalidRequest, ModelNotFound, ModelUnavailable
from core.host import HostState
from core.loader import Loading
from core.metrics import token_intervals
from core.response_store import ResponseStore
from core.selection import Selection
from core.service import Service
from core.settings import Settings
from core.store.directory import LocalModel
from core.store.reference import File, Reference
from core.store.store import Fetched
from core.timeline import Timeline

CARD = ModelCard(
    name="fake-1b",
    path="/models/fake-1b.gguf",
    size_bytes=1000,
    description="fake 1B Q4_0",
    architecture="fake",
    n_params=1_000_000_000,
    n_vocab=256,
    n_ctx=512,
    n_ctx_train=2048,
    chat_template=None,
    bos="<s>",
    eos="</s>",
    infill=InfillTokens(1, 2, 3, 4, 5),
)


class ScriptedEngine:
    """Answer every sequence of every request with `text`, one token per item of `pieces` (words by default).

    A piece is text or an event. Reasoning counts as reasoning tokens. A CallEnd makes the finish reason "tool_calls".
    Prompt tokens are UTF-8 bytes. `delay` seconds pass before each piece; `endless` repeats the text until it
    is cancelled or `max_tokens` is reached. `error` is raised instead of the first piece. `requests` records requests;
    `running` counts the generations that have neither ended nor been cancelled.
    """

    def __init__(
        self,
        text: str = "Hello there, friend.",
        *,
        pieces: tuple[str | Event, ...] | None = None,
        card: ModelCard = CARD,
        delay: float = 0.0,
        endless: bool = False,
        cached_tokens: int = 0,
        error: Exception | None = None,
    ) -> None:
        self.card = card
        self.config = EngineConfig(n_ctx=card.n_ctx)
        self.pieces = pieces or tuple(re.findall(r"\S+\s*", text))
        self.delay = delay
        self.endless = endless
        self.cached_tokens = cached_tokens
        self.error = error
        self.requests: list[GenerationRequest] = []
        self.running = 0
        self.closed = False
        self.warmed = False
        self.failed: ApiError | None = None

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        return list(text.encode())

    def token_pieces(self, tokens: Collection[int], *, special: bool) -> list[bytes]:
        return [bytes([token]) for token in tokens]

    def is_end(self, token: int) -> bool:
        return False

    def control_names(self, text: str) -> list[int]:
        return []

    def check_grammar(self, grammar: str) -> None:
        if "unsatisfiable" in grammar:
            raise InvalidRequest("The grammar cannot be satisfied.")

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        if len(request.prompt) + 1 > self.card.n_ctx:
            raise ContextOverflow(len(request.prompt), self.card.n_ctx, self.card.remedy)
        if self.running >= self.config.n_parallel + self.config.max_queue:
            raise Busy("The queue is full.")
        self.requests.append(request)
        self.running += 1
        return ScriptedGeneration(self, request)

    def warm(self) -> None:
        self.warmed = True

    def stats(self) -> dict[str, Any]:
        return {
            "decode_calls": 0,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "completion_tokens": 0,
            "requests": len(self.requests),
            "sequences": {"running": self.running, "total": self.config.n_parallel},
            "queued": 0,
            "kv_cells": {"used": 0, "total": self.card.n_ctx},
        }

    def stop(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class ScriptedGeneration:
    def __init__(self, engine: ScriptedEngine, request: GenerationRequest) -> None:
        self.cached_tokens = engine.cached_tokens
        self.timings = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)
        self.token_intervals = token_intervals()
        self._engine = engine
        self._open = True
        self._todo = self._script(request)

    def _script(self, request: GenerationRequest) -> list[Delta]:
        script = self._engine.pieces * (1 if not self._engine.endless else 10_000)
        cut = request.max_tokens is not None and request.max_tokens < len(script)
        script = script[: request.max_tokens] if cut else script
        last = len(script) - 1
        own: FinishReason = "tool_calls" if any(isinstance(piece, CallEnd) for piece in script) else "stop"
        end: tuple[FinishReason, Cause | None] = ("length", "max_tokens") if cut else (own, None)
        deltas = []
        for at, piece in enumerate(script):
            for index in range(request.n):
                event = Text(piece) if isinstance(piece, str) else piece
                reasoning = int(isinstance(event, Reasoning))
                events = () if event == Text("") else (event,)
                finish_reason, cause = end if at == last else (None, None)
                deltas.append(Delta(index, events, 1, (), finish_reason, cause, None, reasoning))
        return deltas

    def __aiter__(self) -> ScriptedGeneration:
        return self

    async def __anext__(self) -> Delta:
        await asyncio.sleep(self._engine.delay)
        if self._engine.error is not None:
            self.cancel()
            raise self._engine.error
        if not self._open or not self._todo:
            self.cancel()
            raise StopAsyncIteration
        if self._engine.closed:
            self.cancel()
            raise ModelUnavailable("The model was released before the answer was finished; try again.")
        return self._todo.pop(0)

    def cancel(self) -> None:
        if self._open:
            self._open = False
            self._engine.running -= 1


class ScriptedEmbedder:
    """An embedding engine without a model. Tokens are bytes between 1 and 2; a vector counts them.

    `requests` has the tokens that were embedded. With `endless`, no vector is ever ready.
    """

    def __init__(
        self, *, pooling: Pooling = "mean", probabilities: bool = False, endless: bool = False, **card: Any
    ) -> None:
        path = "/models/fake-embed.gguf"
        self.card = replace(CARD, **{"name": "fake-embed", "path": path, "n_ctx": 64, "n_ctx_train": 64, **card})
        self.config = EngineConfig()
        self.pooling: Pooling = pooling
        self.n_dimensions = 1 if pooling == "rank" else 4
        self.probabilities = probabilities
        self.endless = endless
        self.requests: list[list[list[int]]] = []
        self.futures: list[Future[list[Vector]]] = []
        self.failed: ApiError | None = None
        self.closed = False

    def encode(self, text: str) -> list[int]:
        return [1, *text.encode(), 2]

    def encode_pair(self, query: str, document: str) -> list[int]:
        return [1, *query.encode(), 2, *document.encode(), 2]

    def embed(self, texts: Sequence[Sequence[int]]) -> Future[list[Vector]]:
        self.requests.append([list(text) for text in texts])
        future: Future[list[Vector]] = Future()
        self.futures.append(future)
        if not self.endless:
            future.set_result([self._vector(text) for text in texts])
        return future

    def _vector(self, tokens: Sequence[int]) -> Vector:
        counts = [len(tokens), tokens[-1] % 7 + 1, sum(tokens) % 11 + 1, -1]
        return array("f", [sum(tokens) % 13 - 6.0] if self.pooling == "rank" else counts)

    def warm(self) -> None:
        return None

    def stats(self) -> dict[str, Any]:
        return {"requests": len(self.requests), "queued": 0}

    def stop(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class FakeLease:
    def __init__(self, host: FakeHost, engine: ScriptedEngine) -> None:
        self.engine = engine
        self._host: FakeHost | None = host

    def release(self) -> None:
        if self._host is not None:
            self._host.leases -= 1
            self._host = None


EMBEDDED = Selection("embedded", "nothing is configured", File(CARD.path), is_local=True, path=CARD.path)
NOTHING = Selection("nothing", "no model is configured, and EMBEDDED_MODEL=off")


class FakeHost:
    """With `engine=None` there is no model to serve. `leases` counts the leases that were not released."""

    def __init__(self, engine: ScriptedEngine | None = None, *, status: str | None = None) -> None:
        self.engine = engine
        self.status = status or ("ready" if engine else "unloaded")
        self.loading: Loading | None = None
        self.error: str | None = None
        self.swap_error: ApiError | None = None
        self.swaps: list[tuple[str | None, EngineConfig]] = []
        self.selection = NOTHING if engine is None else EMBEDDED
        self.leases = 0
        self.started = False
        self.load_argument: bool | None = None
        self.closed: float | None = None

    @property
    def boot(self) -> dict[str, str | None]:
        return self.selection.report()

    def state(self) -> HostState:
        ready = self.status == "ready"
        name = self.engine.card.name if self.engine else None
        path = self.engine.card.path if self.engine and ready else self.boot.get("path")
        engine = self.engine if ready else None
        return HostState(self.status, name, self.loading, self.error, engine, path, self.leases)  # type: ignore[arg-type]

    def start(self, *, load: bool | None = None) -> None:
        self.started = True
        self.load_argument = load

    async def lease(self, deadline: float | None = None) -> FakeLease:
        if self.engine is None:
            raise ModelUnavailable("No model is configured.")
        self.status = "ready"
        self.leases += 1
        return FakeLease(self, self.engine)

    async def wait_ready(self, seconds: float) -> HostState:
        self.start()
        await asyncio.sleep(min(seconds, 0.01))
        if self.engine is not None:
            self.status = "ready"
        return self.state()

    async def swap(self, reference: Reference | None, config: EngineConfig) -> HostState:
        if self.swap_error is not None:
            raise self.swap_error
        path = None if reference is None else str(reference)
        self.swaps.append((path, config))
        card = (self.engine or ScriptedEngine()).card
        if path is not None:
            card = replace(card, name=Path(path).stem, path=path)
        self.engine = ScriptedEngine(card=card)
        self.engine.config = config
        self.status = "ready"
        return self.state()

    async def close(self, grace: float) -> None:
        self.closed = grace
        end = asyncio.get_running_loop().time() + grace
        while self.leases and asyncio.get_running_loop().time() < end and self.closed == grace:
            await asyncio.sleep(0.01)
        if self.engine is not None:
            self.engine.stop()


class FakeStore:
    """Lists `models`. A fetch returns `fetched` or raises `fetch_error`."""

    def __init__(self, models: tuple[LocalModel, ...] = ()) -> None:
        self.models = models
        self.fetched = Fetched("downloaded", Path("/models/a.gguf"), 1000, "0" * 64, "huggingface", "c" * 40)
        self.fetch_error: Exception | None = None
        self.fetches: list[tuple[Any, str | None]] = []
        self.on_fetch: Callable[[Callable[[int, int], None], Callable[[], bool]], None] | None = None

    def list(self) -> tuple[LocalModel, ...]:
        return self.models

    def locate(self, path: str) -> Path:
        for model in self.models:
            if path in (model.name, str(model.path)):
                return model.path
        if ".." in path:
            raise InvalidRequest("The path is outside MODELS_DIR.", param="model_path")
        raise ModelNotFound(f"There is no model {path!r}.", param="model_path")

    def present(self, reference: Any) -> Path | None:
        return None

    def fetch(
        self,
        reference: Any,
        *,
        sha256: str | None = None,
        refresh: bool = True,
        progress: Any = None,
        cancelled: Any = None,
    ) -> Fetched:
        self.fetches.append((reference, sha256))
        if self.on_fetch is not None:
            self.on_fetch(progress, cancelled)
        if self.fetch_error is not None:
            raise self.fetch_error
        return self.fetched


@dataclass
class FakeService:
    """A Service made of fakes, and the fakes themselves. The code under test gets `service`."""

    service: Service
    host: FakeHost
    store: FakeStore
    engine: ScriptedEngine


def fake_service(
    engine: ScriptedEngine | None = None,
    *,
    host: FakeHost | None = None,
    embedder: ScriptedEmbedder | None = None,
    store: FakeStore | None = None,
    **settings: Any,
) -> FakeService:
    """Build a service. Settings are keywords, e.g. `api_keys=keys("secret")`. LOCAL_ADMIN is on, as in `make dev`."""
    engine = engine or ScriptedEngine()
    host = host or FakeHost(engine)
    store = store or FakeStore()
    parsed = Settings(**{"local_admin": True, **settings})
    embeddings = None if embedder is None else FakeHost(embedder)  # type: ignore[arg-type]
    responses = ResponseStore(parsed.responses_store)
    service = Service(
        parsed,
        store,  # type: ignore[arg-type]
        host,  # type: ignore[arg-type]
        Timeline(),
        Downloads(store),  # type: ignore[arg-type]
        responses=responses,
        embedder=embeddings,  # type: ignore[arg-type]
    )
    return FakeService(service, host, store, engine)
