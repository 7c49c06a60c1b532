"""Describe each route for `/openapi.json` and `/docs`, as data.

A type is named as "module:Class" and imported only when the document is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core.errors import (
    ApiError,
    Busy,
    ContextOverflow,
    DeadlineExceeded,
    ModelNotFound,
    ModelUnavailable,
    NotFound,
    NotSupported,
)

# The errors of every route that runs the model.
GENERATION = (ModelNotFound, ContextOverflow, Busy, ModelUnavailable, DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the query, or of the path if its name is in `Operation.path`. `schema` is a JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route of the document.

    `request` is the struct of the JSON body, `answer` that of the JSON answer, and `events` are the structs of the
    answer's events if the route streams. `errors` are those that the route adds to the ones that every route can
    answer with; `error` is the struct of their body if it is not OpenAI's envelope. `example` is a request body for
    the document and the command line in `/docs`. `path` is the OpenAPI path of a route whose path ends in "/".
    """

    summary: str
    request: str | None = None
    answer: str | None = None
    events: tuple[str, ...] = ()
    errors: tuple[type[ApiError], ...] = ()
    error: str | None = None
    example: Mapping[str, Any] | None = None
    path: str | None = None
    parameters: tuple[Parameter, ...] = ()
    media_type: str = "application/json"  # of the answer
    selector: str | None = None  # the request's field that selects fields of the answer
    named_events: bool = False  # each event of a stream has a line `event: TYPE`
    done: Literal["[DONE]", ""] = "[DONE]"  # the data of a stream's last event, if it is not JSON


_CHAT = Operation(
    summary="Answer a chat. OpenAI's chat completion.",
    request="core.wire.chat:ChatRequest",
    answer="core.wire.chat:Completion",
    events=("core.wire.chat:Chunk",),
    errors=GENERATION,
    example={"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32},
)

_COMPLETION = Operation(
    summary="Continue one or several texts. OpenAI's legacy completion.",
    request="core.wire.completions:CompletionRequest",
    answer="core.wire.completions:Completion",
    events=("core.wire.completions:Completion",),
    errors=GENERATION,
    example={"prompt": "Once upon a time", "max_tokens": 32},
)

_INPUT_TOKENS = Operation(
    summary="Return the number of prompt tokens that a chat would have.",
    request="core.wire.chat:ChatRequest",
    answer="core.wire.tokens:InputTokens",
    errors=(ModelNotFound, ModelUnavailable),
    example={"messages": [{"role": "user", "content": "Say hello."}]},
)

_EMBEDDINGS = Operation(
    summary="Turn texts into vectors with the embedding model. OpenAI's embeddings.",
    request="core.wire.embeddings:EmbeddingRequest",
    answer="core.wire.embeddings:EmbeddingList",
    errors=GENERATION,
    example={"input": "Hello"},
)

_RERANK = Operation(
    summary="Rank documents by their relevance to a query, with a reranking model.",
    request="core.wire.rerank:RerankRequest",
    answer="core.wire.rerank:Ranking",
    errors=GENERATION,
    example={"query": "What is a river?", "documents": ["A river is flowing water.", "Bread needs flour."]},
)

_RESPONSES = Operation(
    summary="Answer a conversation of items. OpenAI's Responses.",
    request="core.wire.responses.request:ResponsesRequest",
    answer="core.wire.responses.answer:Response",
    events=tuple(
        f"core.wire.responses.events:{name}"
        for name in (
            "ResponseEvent",
            "ItemEvent",
            "PartEvent",
            "TextDelta",
            "TextDone",
            "ReasoningDelta",
            "ReasoningDone",
            "CallDelta",
            "ArgumentsDone",
            "CustomInputDone",
            "ErrorEvent",
        )
    ),
    errors=GENERATION,
    example={"input": "Say hello.", "max_output_tokens": 32},
    named_events=True,
    done="",
)

_RESPONSES_INPUT_TOKENS = Operation(
    summary="Return the number of prompt tokens that a response would have.",
    request="core.wire.responses.request:ResponsesRequest",
    answer="core.wire.tokens:InputTokens",
    errors=(ModelNotFound, ModelUnavailable),
    example={"input": "Say hello."},
)

_RESPONSE_ID = Parameter("id", {"type": "string", "minLength": 1}, "The id of a stored response.")

_GET_RESPONSE = Operation(
    summary="Return a stored response. Needs RESPONSES_STORE.",
    answer="core.wire.responses.answer:Response",
    parameters=(_RESPONSE_ID,),
    errors=(NotFound,),
)

_DELETE_RESPONSE = Operation(
    summary="Delete a stored response.",
    answer="core.wire.responses.answer:Deleted",
    parameters=(_RESPONSE_ID,),
    errors=(NotFound,),
)

_INPUT_ITEMS = Operation(
    summary="List the items of the conversation before a stored response.",
    answer="core.wire.responses.answer:ItemList",
    parameters=(
        _RESPONSE_ID,
        Parameter("limit", {"type": "integer", "minimum": 1, "maximum": 100}, "The most items; 20 by default."),
        Parameter("order", {"enum": ["asc", "desc"]}, "The latest item first (desc, the default) or last."),
        Parameter("after", {"type": "string"}, "The id of the last item of the page before."),
    ),
    errors=(NotFound,),
)

# One entry for each route of `handlers.routes`: "METHOD path". A test fails for a route without an entry.
OPERATIONS: Mapping[str, Operation] = {
    "GET /health": Operation(
        summary="Report whether a model can answer. With `wait`, load it first.",
        answer="core.health:Health",
        parameters=(
            Parameter(
                "wait",
                {"type": "number", "minimum": 0, "maximum": 3600},
                "Load the model, and answer when it is ready, has failed, or after this many seconds. Needs a key.",
            ),
        ),
    ),
    "GET /models": Operation(
        summary="Report the active model, the models on this machine and the phases of the start.",
        answer="core.models:Models",
    ),
    "GET /v1/models": Operation(
        summary="List the served model and its aliases. OpenAI's list of models.",
        answer="core.models:ModelList",
    ),
    "GET /v1/models/": Operation(
        summary="Return one entry of that list.",
        answer="core.models:ModelEntry",
        path="/v1/models/{model}",
        parameters=(
            Parameter("model", {"type": "string", "minLength": 1}, "A name of the list. It may hold slashes."),
        ),
        errors=(ModelNotFound,),
    ),
    "POST /load": Operation(
        summary="Download a model to this machine. The served model does not change.",
        request="core.load:LoadRequest",
        answer="core.load:LoadResult",
        events=("core.load:LoadProgress", "core.load:LoadResult"),
        errors=(ModelNotFound, Busy, ModelUnavailable),
        example={"repo_id": "org/repo", "filename": "file.gguf"},
    ),
    "POST /reload": Operation(
        summary="Switch to a model on this machine, or load the served one with another configuration.",
        request="core.reload:ReloadRequest",
        answer="core.reload:ReloadResult",
        errors=(ModelNotFound, Busy, ModelUnavailable),
        example={"n_ctx": 4096},
    ),
    "POST /v1/chat/completions": _CHAT,
    "POST /chat/completions": _CHAT,
    "POST /v1/extract": Operation(
        summary="Turn a text into JSON that follows a schema.",
        request="core.extract:ExtractRequest",
        answer="core.extract:Extraction",
        events=("core.extract:ExtractionDelta", "core.extract:Extraction"),
        errors=GENERATION,
        example={
            "text": "Invoice 17 of Ada Ltd, 120 EUR.",
            "schema": {"type": "object", "properties": {"total": {"type": "number"}}, "required": ["total"]},
        },
    ),
    "GET /metrics": Operation(
        summary="Report counters, gauges and histograms. Prometheus text 0.0.4.",
        media_type="text/plain",
    ),
    "POST /v1/completions": _COMPLETION,
    "POST /completions": _COMPLETION,
    "POST /infill": Operation(
        summary="Fill the gap between two texts, for code editors. llama-server's route.",
        request="core.wire.infill:InfillRequest",
        answer="core.wire.infill:Infill",
        selector="response_fields",
        events=("core.wire.infill:Infill",),
        errors=(*GENERATION, NotSupported),
        example={"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 16},
    ),
    "POST /v1/chat/completions/input_tokens": _INPUT_TOKENS,
    "POST /chat/completions/input_tokens": _INPUT_TOKENS,
    "POST /tokenize": Operation(
        summary="Return the tokens of a text, or of the prompt that the messages of a chat become.",
        request="core.wire.tokens:TokenizeRequest",
        answer="core.wire.tokens:Tokens",
        errors=(ModelNotFound, ModelUnavailable),
        example={"content": "Hello"},
    ),
    "POST /detokenize": Operation(
        summary="Return the text of tokens.",
        request="core.wire.tokens:DetokenizeRequest",
        answer="core.wire.tokens:Detokenized",
        errors=(ModelNotFound, ModelUnavailable),
        example={"tokens": [1, 2, 3]},
    ),
    "POST /v1/embeddings": _EMBEDDINGS,
    "POST /embeddings": _EMBEDDINGS,
    "POST /v1/rerank": _RERANK,
    "POST /rerank": _RERANK,
    "POST /v1/messages": Operation(
        summary="Answer a conversation. Anthropic's messages.",
        request="core.wire.messages:MessagesRequest",
        answer="core.wire.messages:AnswerMessage",
        events=tuple(
            f"core.wire.messages:{name}"
            for name in (
                "MessageStart",
                "BlockStart",
                "ContentDelta",
                "BlockStop",
                "MessageDelta",
                "MessageStop",
            )
        ),
        errors=GENERATION,
        error="core.wire.messages:ErrorEnvelope",
        example={"max_tokens": 32, "messages": [{"role": "user", "content": "Say hello."}]},
        done="",
    ),
    "POST /v1/messages/count_tokens": Operation(
        summary="Count the prompt tokens that the same message would have.",
        request="core.wire.messages:CountRequest",
        answer="core.wire.messages:TokenCount",
        errors=(ModelNotFound, ModelUnavailable),
        error="core.wire.messages:ErrorEnvelope",
        example={"messages": [{"role": "user", "content": "Say hello."}]},
    ),
    "POST /v1/responses": _RESPONSES,
    "POST /responses": _RESPONSES,
    "POST /v1/responses/input_tokens": _RESPONSES_INPUT_TOKENS,
    "POST /responses/input_tokens": _RESPONSES_INPUT_TOKENS,
    "GET /v1/responses/{id}": _GET_RESPONSE,
    "GET /responses/{id}": _GET_RESPONSE,
    "DELETE /v1/responses/{id}": _DELETE_RESPONSE,
    "DELETE /responses/{id}": _DELETE_RESPONSE,
    "GET /v1/responses/{id}/input_items": _INPUT_ITEMS,
    "GET /responses/{id}/input_items": _INPUT_ITEMS,
    "GET /openapi.json": Operation(
        summary="Return this document. OpenAPI 3.1.",
    ),
    "GET /docs": Operation(
        summary="Show this document as a page.",
        media_type="text/html",
    ),
}
