"""Rank documents by their relevance to a query, with a reranking model as the embedding model."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial

from core import embeddings
from core.engine.interface import Embedder, Vector
from core.errors import InvalidRequest, ModelUnavailable
from core.service import Service
from core.wire.rerank import Document, Ranked, Ranking, RerankRequest, RerankUsage


async def rerank(service: Service, request: RerankRequest, *, ends: float | None = None) -> Ranking:
    """Return the documents with their scores, the most relevant first.

    Raises InvalidRequest, ModelNotFound, Busy, ModelUnavailable and DeadlineExceeded.
    """
    texts = request.texts()
    probabilities = False

    def build(engine: Embedder) -> list[Sequence[int]]:
        nonlocal probabilities
        probabilities = engine.probabilities
        if engine.pooling != "rank":
            raise InvalidRequest(
                f"The model {engine.card.name!r} does not rank documents: it has {engine.pooling!r} pooling, and a "
                "reranking model has 'rank'. Set EMBEDDING_MODEL_PATH to a reranking model.",
                param="model",
            )
        fields = [f"documents[{place}]" for place in range(len(texts))]
        embeddings.check_characters(engine.card, request.query, "query")
        return embeddings.collect(engine.card, map(partial(_pair, engine, request.query), texts, fields), fields)

    computed = await embeddings.compute(service, request.model, build, ends)
    scores = [relevance(vector, probability=probabilities) for vector in computed.vectors]
    order = sorted(range(len(texts)), key=lambda place: -scores[place])[: request.top_n]
    results = [Ranked(place, scores[place]) for place in order]
    if request.return_documents:
        for ranked in results:
            ranked.document = Document(texts[ranked.index])
    return Ranking(computed.model, results, RerankUsage(computed.tokens, computed.tokens))


def _pair(engine: Embedder, query: str, document: str, field: str) -> Sequence[int]:
    embeddings.check_characters(engine.card, document, field)
    return array("i", engine.encode_pair(query, document))


def relevance(vector: Vector, *, probability: bool) -> float:
    """Return a score from 0 to 1: the model's probability, or the sigmoid of its logit."""
    score = vector[0]
    if not math.isfinite(score):
        raise ModelUnavailable("The reranking model computed a score that is not finite.")
    if probability:
        return score
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))
