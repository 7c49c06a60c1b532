"""Embeddings and reranking over a scripted engine: answers, names, limits, and every client's mistake."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from array import array
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import pytest

from core import embeddings
from core.errors import ModelUnavailable
from core.rerank import relevance
from core.wire.rerank import MOST_DOCUMENTS
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import FakeService, ScriptedEmbedder, fake_service


def post(fake: FakeService, path: str, body: Any, deadline: float | None = None) -> tuple[int, Any]:
    headers = {"content-type": "application/json"}
    request = Request("POST", path, "req_1", headers, body=json.dumps(body).encode(), deadline=deadline)

    async def ask() -> tuple[int, Any]:
        response = await dispatch(fake.service, request)
        assert isinstance(response.body, bytes)
        return response.status, json.loads(response.body)

    return asyncio.run(ask())


def serving(embedder: ScriptedEmbedder | None = None, **settings: Any) -> FakeService:
    return fake_service(embedder=embedder or ScriptedEmbedder(), **settings)


def vectors(answer: Any) -> list[list[float]]:
    return [entry["embedding"] for entry in answer["data"]]


def test_an_answer_has_openais_shape() -> None:
    status, answer = post(serving(), "/v1/embeddings", {"input": ["Hello", "you"], "user": "ada"})

    assert status == 200
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    assert {name: answer[name] for name in ("object", "model", "usage")} == {
        "object": "list",
        "model": "fake-embed",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-6) for vector in vectors(answer))


def test_base64_holds_the_same_32_bit_floats() -> None:
    fake = serving()
    _, floats = post(fake, "/embeddings", {"input": "Hello", "encoding_format": "float"})
    _, encoded = post(fake, "/embeddings", {"input": "Hello", "encoding_format": "base64"})

    raw = b64decode(encoded["data"][0]["embedding"])

    assert list(struct.unpack("<4f", raw)) == floats["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("ab", [[1, 97, 98, 2]]),
        (["ab"], [[1, 97, 98, 2]]),
        (["a", "b"], [[1, 97, 2], [1, 98, 2]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_input_is_a_text_texts_tokens_or_token_lists(given: Any, tokens: list[list[int]]) -> None:
    """Texts get the model's special tokens. Token lists are taken as they are."""
    embedder = ScriptedEmbedder()

    status, answer = post(serving(embedder), "/v1/embeddings", {"input": given})

    assert (status, len(answer["data"])) == (200, len(tokens))
    assert embedder.requests == [tokens]


def test_dimensions_cut_a_vector_and_scale_it_again() -> None:
    fake = serving(embedding_matryoshka=True)
    _, whole = post(fake, "/v1/embeddings", {"input": "Hello"})
    _, cut = post(fake, "/v1/embeddings", {"input": "Hello", "dimensions": 2})

    [[first, second, *_]], [short] = vectors(whole), vectors(cut)

    assert short == pytest.approx([first / math.hypot(first, second), second / math.hypot(first, second)])


@pytest.mark.parametrize("metadata", [{"fake.matryoshka_dimensions": "[2, 3]"}, {"general.matryoshka": "true"}])
def test_a_model_may_say_that_its_vectors_can_be_cut(metadata: dict[str, str]) -> None:
    status, answer = post(
        serving(ScriptedEmbedder(metadata=metadata)), "/v1/embeddings", {"input": "a", "dimensions": 3}
    )

    assert (status, len(answer["data"][0]["embedding"])) == (200, 3)


@pytest.mark.parametrize("name", ["fake-embed", "text-embedding-3-small", None])
def test_the_model_has_its_name_and_aliases(name: str | None) -> None:
    fake = serving(embedding_model_aliases=("text-embedding-3-small",))

    assert post(fake, "/v1/embeddings", {"input": "a", "model": name})[0] == 200


def test_a_star_accepts_any_name() -> None:
    assert post(serving(embedding_model_aliases=("*",)), "/v1/embeddings", {"input": "a", "model": "x"})[0] == 200


LONG = "x" * 63  # 65 tokens with the special ones; the model reads 64

# Path, body, parts of the message, param
MISTAKES: list[tuple[str, Any, str, str | None]] = [
    ("/v1/embeddings", {}, "'input' is missing", "input"),
    ("/v1/embeddings", {"input": None}, "'input' must be", "input"),
    ("/v1/embeddings", {"input": 5}, "'input' must be", "input"),
    ("/v1/embeddings", {"input": ""}, "'input' is empty", "input"),
    ("/v1/embeddings", {"input": []}, "'input' is an empty array", "input"),
    ("/v1/embeddings", {"input": ["a", ""]}, "'input[1]' is empty", "input[1]"),
    ("/v1/embeddings", {"input": [[1], []]}, "'input[1]' is empty", "input[1]"),
    ("/v1/embeddings", {"input": ["a", 5]}, "mixture", "input"),
    ("/v1/embeddings", {"input": ["a", [5]]}, "mixture", "input"),
    ("/v1/embeddings", {"input": [1.5]}, "'input[0]' must be", "input[0]"),
    ("/v1/embeddings", {"input": [-1]}, "'input[0]' must be", "input[0]"),
    ("/v1/embeddings", {"input": [[1, "a"]]}, "'input[0][1]' must be", "input[0][1]"),
    ("/v1/embeddings", {"input": [1, 256]}, "token 256, but this model's tokens are 0 to 255", "input"),
    ("/v1/embeddings", {"input": [[1], [999]]}, "check_embedding_ctx_length=False", "input[1]"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "at most 2048 texts, got 2049", "input"),
    ("/v1/embeddings", {"input": LONG}, "65 tokens, but the embedding model reads at most 64", "input"),
    ("/v1/embeddings", {"input": ["a", LONG]}, "'input[1]' has 65 tokens", "input[1]"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "one of 'base64', 'float'", "encoding_format"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "'dimensions' must be", "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, "from 1 to 4 for this model, got 5", "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 2}, "EMBEDDING_MATRYOSHKA=true", "dimensions"),
    ("/v1/embeddings", {"input": "a", "truncate": True}, "'truncate' is not supported", "truncate"),
    ("/v1/embeddings", {"input": "a", "normalize": False}, "'normalize' is not supported", "normalize"),
    ("/v1/embeddings", {"input": "a", "input_type": "query"}, "'input_type' is not supported", "input_type"),
    ("/v1/rerank", {"documents": ["a"]}, "'query' is missing", "query"),
    ("/v1/rerank", {"query": "q"}, "'documents' is missing", "documents"),
    ("/v1/rerank", {"query": "", "documents": ["a"]}, "'query' must be", "query"),
    ("/v1/rerank", {"query": "q", "documents": []}, "'documents' must be", "documents"),
    ("/v1/rerank", {"query": "q", "documents": ["a", ""]}, "'documents[1]' is empty", "documents[1]"),
    ("/v1/rerank", {"query": "q", "documents": [5]}, "'documents[0]' must be", "documents[0]"),
    ("/v1/rerank", {"query": "q", "documents": ["a"] * (MOST_DOCUMENTS + 1)}, "'documents' must be", "documents"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "'top_n' must be", "top_n"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": ["b"]}, "not supported", "rank_fields"),
    ("/v1/rerank", {"query": "q", "documents": ["a"]}, "does not rank documents: it has 'mean' pooling", "model"),
]


@pytest.mark.parametrize(("path", "body", "message", "param"), MISTAKES)
def test_a_clients_mistake_is_a_400(path: str, body: Any, message: str, param: str | None) -> None:
    embedder = ScriptedEmbedder()

    status, answer = post(serving(embedder), path, body)

    assert status == 400, answer
    assert message in answer["error"]["message"], answer
    assert (answer["error"]["param"], answer["error"]["type"]) == (param, "invalid_request_error")
    assert embedder.requests == []


def test_a_long_text_has_openais_code() -> None:
    _, answer = post(serving(), "/v1/embeddings", {"input": LONG})

    assert answer["error"]["code"] == "context_length_exceeded"


def test_the_tokens_of_a_request_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MOST_TOKENS", 10)

    status, answer = post(serving(), "/v1/embeddings", {"input": ["abc", "def", "g"]})

    assert (status, answer["error"]["param"]) == (400, "input")
    assert "more than 10 tokens, the most of one request" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": ["a", "x" * 10_000]}, "input[1]"),
        ("/v1/rerank", {"query": "x" * 10_000, "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["x" * 10_000]}, "documents[0]"),
    ],
)
def test_a_text_that_cannot_fit_is_not_tokenized(path: str, body: Any, param: str) -> None:
    """Tokenizing megabytes takes seconds."""
    embedder = ScriptedEmbedder(pooling="rank" if "rerank" in path else "mean")
    fake = serving(embedder)
    embedder.encode = lambda text: [1] if text == "a" else pytest.fail("tokenized")  # type: ignore[method-assign]
    embedder.encode_pair = lambda *_: pytest.fail("tokenized")  # type: ignore[method-assign]

    status, answer = post(fake, path, body)

    assert (status, answer["error"]["param"]) == (400, param)
    assert "10000 characters" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/embeddings", {"input": "a"}), ("/v1/rerank", {"query": "q", "documents": ["a"]})]
)
def test_without_an_embedding_model_the_error_names_the_setting(path: str, body: dict[str, Any]) -> None:
    """The chat model makes no embeddings, under whatever name it is asked."""
    for name in ("fake-1b", "text-embedding-3-small", None):
        status, answer = post(fake_service(), path, {**body, "model": name})

        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "EMBEDDING_MODEL_PATH" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("fake-1b", "is the chat model"), ("gpt", "is the chat model"), ("other", "does not exist here")],
)
def test_another_name_is_a_404_that_names_the_embedding_model(name: str, message: str) -> None:
    status, answer = post(serving(model_aliases=("gpt",)), "/v1/embeddings", {"input": "a", "model": name})

    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert message in answer["error"]["message"]
    assert "'fake-embed' (EMBEDDING_MODEL_PATH)" in answer["error"]["message"]


def test_the_embedding_model_cannot_chat() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "model": "fake-embed"}
    status, answer = post(serving(), "/v1/chat/completions", body)

    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "POST /v1/embeddings" in answer["error"]["message"]


@pytest.mark.parametrize(("pooling", "message"), [("none", "has no pooling"), ("rank", "Use POST /v1/rerank")])
def test_a_model_without_a_vector_for_a_text_is_a_400(pooling: Any, message: str) -> None:
    status, answer = post(serving(ScriptedEmbedder(pooling=pooling)), "/v1/embeddings", {"input": "a"})

    assert (status, answer["error"]["param"]) == (400, "model")
    assert message in answer["error"]["message"]


def test_a_deadline_drops_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = ScriptedEmbedder(endless=True)
    status, answer = post(serving(embedder), "/v1/embeddings", {"input": "a"}, deadline=0.0)

    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert all(future.cancelled() for future in embedder.futures)


def test_a_client_that_leaves_drops_the_texts() -> None:
    embedder = ScriptedEmbedder(endless=True)
    fake = serving(embedder)
    body = json.dumps({"input": "a"}).encode()
    request = Request("POST", "/v1/embeddings", "req_1", {"content-type": "application/json"}, body=body)

    async def leave() -> None:
        asking = asyncio.ensure_future(dispatch(fake.service, request))
        while not embedder.futures:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})

    asyncio.run(leave())
    assert embedder.futures[0].cancelled()
    assert fake.service.embedder is not None
    assert fake.service.embedder.state().leases == 0


def test_documents_come_in_order_of_relevance() -> None:
    fake = serving(ScriptedEmbedder(pooling="rank"))
    documents = ["a", "b", {"text": "c"}, "d" * 9]

    status, answer = post(fake, "/v1/rerank", {"query": "q", "documents": documents})

    assert (status, answer["model"]) == (200, "fake-embed")
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 5 * 3 + 13, "total_tokens": 5 * 3 + 13}
    assert "document" not in answer["results"][0]


def test_the_best_documents_can_be_returned() -> None:
    fake = serving(ScriptedEmbedder(pooling="rank"))
    documents = ["a", {"text": "b"}, "c"]
    body = {"query": "q", "documents": documents, "top_n": 2, "return_documents": True}

    _, answer = post(fake, "/rerank", body)

    assert len(answer["results"]) == 2
    for result in answer["results"]:
        assert result["document"] == {"text": "abc"[result["index"]]}


def test_a_long_document_is_a_400() -> None:
    fake = serving(ScriptedEmbedder(pooling="rank"))
    status, answer = post(fake, "/v1/rerank", {"query": "q", "documents": ["a", "x" * 70]})

    assert (status, answer["error"]["param"]) == (400, "documents[1]")


@pytest.mark.parametrize(("logit", "score"), [(0.0, 0.5), (800.0, 1.0), (-800.0, 0.0), (2.0, 0.880797)])
def test_a_logit_becomes_a_score_from_0_to_1(logit: float, score: float) -> None:
    assert relevance(array("f", [logit]), probability=False) == pytest.approx(score)


def test_a_probability_stays_one() -> None:
    assert relevance(array("f", [0.25, 0.75]), probability=True) == 0.25


@pytest.mark.parametrize("work", [embeddings.unit, lambda vector: relevance(vector, probability=False)])
def test_numbers_that_are_not_finite_never_reach_a_client(work: Callable[[Any], Any]) -> None:
    with pytest.raises(ModelUnavailable, match="not finite"):
        work(array("f", [float("nan"), 1.0]))


def test_a_vector_of_zeros_stays_one() -> None:
    assert list(embeddings.unit(array("f", [0.0, 0.0]))) == [0.0, 0.0]


def get(fake: FakeService, path: str) -> Any:
    response = asyncio.run(dispatch(fake.service, Request("GET", path, "req_1")))
    assert isinstance(response.body, bytes)
    return json.loads(response.body)


def test_the_model_is_listed_with_its_aliases() -> None:
    fake = serving(model_aliases=("gpt",), embedding_model_aliases=("embed", "gpt"))

    assert [entry["id"] for entry in get(fake, "/v1/models")["data"]] == ["fake-1b", "gpt", "fake-embed", "embed"]
    assert get(fake, "/v1/models/embed")["id"] == "embed"
    report = get(fake, "/models")["embeddings"]
    assert (report["name"], report["state"]) == ("fake-embed", "ready")
    assert (report["pooling"], report["dimensions"], report["n_ctx"]) == ("mean", 4, 64)
    assert "path" not in report


def test_health_reports_the_embedding_model() -> None:
    assert get(serving(), "/health")["embeddings"]["engine"] == {"requests": 0, "queued": 0}
    assert "embeddings" not in get(fake_service(), "/health")
    assert "embeddings" not in get(fake_service(), "/models")


def test_closing_the_service_closes_both_models() -> None:
    embedder = ScriptedEmbedder()
    fake = serving(embedder)

    asyncio.run(fake.service.close(0))

    assert (fake.engine.closed, embedder.closed) == (True, True)
