"""Embed texts with the embedding model. `core.rerank` runs on the same model and shares its checks."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from core.engine.interface import Embedder, ModelCard, Vector
from core.engine.prompt.text import LONGEST_TOKEN
from core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, ModelUnavailable
from core.host import Host
from core.lending import Lease, in_thread
from core.metrics import error_code
from core.service import Service
from core.wire.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage, Text

MOST_TOKENS = 300_000  # of one request; OpenAI's limit

NONE_CONFIGURED = (
    "There is no embedding model here. Set EMBEDDING_MODEL_PATH to the GGUF file of one, or to its hf:// or s3:// "
    "reference, and restart."
)


class Computed(NamedTuple):
    """What the model made of the texts of one request."""

    vectors: list[Vector]
    tokens: int  # of all texts, with the special ones
    model: str


def host(service: Service, name: str | None) -> Host[Embedder]:
    """Return the host of the embedding model. Raises ModelNotFound without one, or if `name` is not one of its names.

    A model whose setting is wrong has no name; its lease raises what is wrong.
    """
    embedder = service.embedder
    if embedder is None:
        raise ModelNotFound(NONE_CONFIGURED, param="model")
    served, aliases = embedder.state().model, service.settings.embedding_model_aliases
    if name is None or served is None or name == served or name in aliases or "*" in aliases:
        return embedder
    allowed = ", ".join(repr(allowed) for allowed in (served, *aliases))
    is_chat = name == service.host.state().model or name in service.settings.model_aliases
    what = "is the chat model and makes no embeddings" if is_chat else "does not exist here"
    raise ModelNotFound(
        f"The model {name[:100]!r} {what}. Use {allowed} (EMBEDDING_MODEL_PATH), or leave 'model' out.", param="model"
    )


async def embed(service: Service, request: EmbeddingRequest, *, ends: float | None = None) -> EmbeddingList:
    """Return the vectors of the texts, each of length 1.

    Raises InvalidRequest, ModelNotFound, Busy, ModelUnavailable and DeadlineExceeded.
    """
    texts = request.texts()

    def build(engine: Embedder) -> list[Sequence[int]]:
        _check_embeds(engine)
        _check_dimensions(engine, request.dimensions, allowed=service.settings.embedding_matryoshka)
        fields = ["input"] if len(texts) == 1 else [f"input[{place}]" for place in range(len(texts))]
        encoded = (_tokens(engine, text, field) for text, field in zip(texts, fields, strict=True))
        return collect(engine.card, encoded, fields)

    computed = await compute(service, request.model, build, ends)
    return await asyncio.to_thread(_answer, computed, request)


async def compute(
    service: Service, model: str | None, build: Callable[[Embedder], list[Sequence[int]]], ends: float | None
) -> Computed:
    """Lease the model, make the texts' tokens in a worker thread, wait for the vectors and count the request."""
    began = time.monotonic()
    embedder = host(service, model)
    try:
        computed = await _compute(embedder, build, ends)
    except BaseException as error:
        service.metrics.failed(embedder.state().model or "", error_code(error))
        raise
    service.metrics.embedded(computed.model, computed.tokens, time.monotonic() - began)
    return computed


async def _compute(
    embedder: Host[Embedder], build: Callable[[Embedder], list[Sequence[int]]], ends: float | None
) -> Computed:
    lease: Lease[Embedder] = await embedder.lease(ends)
    try:
        tokens = await in_thread(lease, build)
        computing = asyncio.wrap_future(lease.engine.embed(tokens))
        try:
            vectors = await asyncio.wait_for(computing, None if ends is None else max(0.0, ends - time.monotonic()))
        except TimeoutError:
            raise DeadlineExceeded(
                "The time was up before all texts were computed. Send fewer texts in a request."
            ) from None
        return Computed(vectors, sum(map(len, tokens)), lease.engine.card.name)
    finally:
        lease.release()


def collect(card: ModelCard, texts: Iterable[Sequence[int]], fields: Sequence[str]) -> list[Sequence[int]]:
    """Return the tokens of the texts, which may be made on the way: nothing comes after a text that is refused.

    Raises InvalidRequest if a text has more tokens than the model reads at once, or all have too many.
    """
    collected: list[Sequence[int]] = []
    total = 0
    for tokens, field in zip(texts, fields, strict=True):
        if len(tokens) > card.n_ctx:
            raise too_long(card, field, f"{len(tokens)} tokens")
        total += len(tokens)
        if total > MOST_TOKENS:
            raise InvalidRequest(
                f"The texts have more than {MOST_TOKENS} tokens, the most of one request. Send several requests.",
                param=fields[0].partition("[")[0],
            )
        collected.append(tokens)
    return collected


def check_characters(card: ModelCard, text: str, field: str) -> None:
    """Raise InvalidRequest if the text certainly has too many tokens. Counting those of 6 MB takes seconds."""
    if len(text) > card.n_ctx * LONGEST_TOKEN:
        raise too_long(card, field, f"{len(text)} characters")


def too_long(card: ModelCard, field: str, length: str) -> InvalidRequest:
    remedy = "Raise N_CTX, or shorten or split the text." if card.n_ctx < card.n_ctx_train else "Shorten or split it."
    return InvalidRequest(
        f"'{field}' has {length}, but the embedding model reads at most {card.n_ctx} tokens. {remedy}",
        param=field,
        code="context_length_exceeded",
    )


def unit(vector: Vector, dimensions: int | None = None) -> Vector:
    """Return the first `dimensions` numbers of a vector, scaled to length 1."""
    cut = vector[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in cut))
    if not math.isfinite(length):
        raise ModelUnavailable("The embedding model computed a vector that is not finite.")
    return array("f", [value / length for value in cut]) if length else cut


def is_matryoshka(card: ModelCard) -> bool:
    """Return whether the model's file says that its vectors may be cut. There is no standard key for it."""
    return any("matryoshka" in key.lower() and value not in ("false", "0") for key, value in card.metadata.items())


def _check_embeds(engine: Embedder) -> None:
    if engine.pooling == "rank":
        raise InvalidRequest(
            f"The model {engine.card.name!r} ranks documents and makes no embeddings. Use POST /v1/rerank.",
            param="model",
        )
    if engine.pooling == "none":
        raise InvalidRequest(
            f"The model {engine.card.name!r} has no pooling, so it makes no embedding of a whole text. Set "
            "EMBEDDING_MODEL_PATH to an embedding model, whose GGUF file has a pooling type.",
            param="model",
        )


def _check_dimensions(engine: Embedder, dimensions: int | None, *, allowed: bool) -> None:
    native = engine.n_dimensions
    if dimensions is None or dimensions == native:
        return
    if dimensions > native:
        raise InvalidRequest(
            f"'dimensions' must be from 1 to {native} for this model, got {dimensions}.", param="dimensions"
        )
    if not allowed and not is_matryoshka(engine.card):
        raise InvalidRequest(
            f"'dimensions' must be {native}, got {dimensions}: the model's file does not say that its vectors may be "
            "cut. If they may (a Matryoshka model), set EMBEDDING_MATRYOSHKA=true.",
            param="dimensions",
        )


def _tokens(engine: Embedder, text: Text, field: str) -> Sequence[int]:
    if isinstance(text, str):
        check_characters(engine.card, text, field)
        return array("i", engine.encode(text))
    n_vocab = engine.card.n_vocab
    if (unknown := next((token for token in text if token >= n_vocab), None)) is not None:
        raise InvalidRequest(
            f"'{field}' has token {unknown}, but this model's tokens are 0 to {n_vocab - 1}. Send strings, or tokens "
            "of this model (LangChain: check_embedding_ctx_length=False).",
            param=field,
        )
    return array("i", text)


def _answer(computed: Computed, request: EmbeddingRequest) -> EmbeddingList:
    def encoded(vector: Vector) -> list[float] | str:
        vector = unit(vector, request.dimensions)
        if request.encoding_format != "base64":
            return vector.tolist()
        if sys.byteorder == "big":
            vector.byteswap()
        return b64encode(vector).decode()

    return EmbeddingList(
        data=[Embedding(place, encoded(vector)) for place, vector in enumerate(computed.vectors)],
        model=computed.model,
        usage=EmbeddingUsage(computed.tokens, computed.tokens),
    )
