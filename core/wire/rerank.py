"""Rerank, in the shape of Jina and Cohere: a query and documents, and the documents in order of relevance."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from core.errors import InvalidRequest
from core.wire.fields import Unsupported, check_unsupported

MOST_DOCUMENTS = 2048


class UnsupportedFields(Unsupported, kw_only=True):
    """The unsupported fields of other servers' reranking."""

    truncate: Any = False
    truncation: Any = False
    truncate_prompt_tokens: Any = None
    max_tokens_per_doc: Any = None
    max_chunks_per_doc: Any = None
    rank_fields: Any = None
    instruction: Any = None


class Document(Struct):
    text: str


class RerankRequest(UnsupportedFields, kw_only=True):
    """`top_n` bounds the results, and `return_documents` adds each document to its result."""

    query: Annotated[str, Meta(min_length=1)]
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MOST_DOCUMENTS)]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None

    def __post_init__(self) -> None:
        check_unsupported(self)
        for place, text in enumerate(self.texts()):
            if not text:
                raise InvalidRequest(f"'documents[{place}]' is empty.", param=f"documents[{place}]")

    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class Ranked(Struct):
    """`index` is the place in the request, and `relevance_score` is from 0 to 1."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Ranking(Struct):
    """The most relevant document comes first."""

    model: str
    results: list[Ranked]
    usage: RerankUsage
