"""POST /v1/embeddings and POST /v1/rerank"""

from __future__ import annotations

from core.embeddings import embed
from core.rerank import rerank
from core.service import Service
from core.session import deadline
from core.wire.embeddings import EmbeddingRequest
from core.wire.rerank import RerankRequest
from handlers.http import Request, Response, add_log_fields, decode, json_response


async def post_embeddings(service: Service, request: Request) -> Response:
    """Return OpenAI's list of embeddings."""
    body = decode(request, EmbeddingRequest)
    answer = await embed(service, body, ends=deadline(service.settings, request.deadline))
    add_log_fields(model=answer.model, texts=len(answer.data), prompt_tokens=answer.usage.prompt_tokens)
    return json_response(answer)


async def post_rerank(service: Service, request: Request) -> Response:
    """Return the documents in order of relevance, as Jina and Cohere do."""
    body = decode(request, RerankRequest)
    answer = await rerank(service, body, ends=deadline(service.settings, request.deadline))
    add_log_fields(model=answer.model, texts=len(body.documents), prompt_tokens=answer.usage.prompt_tokens)
    return json_response(answer)
