"""Embeddings over HTTP: a tiny embedding model beside a tiny chat model, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from adapters.wiring import build
from core.service import Service
from core.settings import Settings
from tests.integration.hub_double import HubDouble, Repo
from tests.serving import serving

Serve = Callable[..., tuple[str, Service]]


@pytest.fixture(scope="module")
def serve(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Serve a chat model and an embedding model, e.g. `serve("bert")`; one server for each configuration."""
    with ExitStack() as stack:
        served: dict[str, tuple[str, Service]] = {}

        def start(kind: str | None, **settings: Any) -> tuple[str, Service]:
            key = f"{kind} {settings}"
            if key not in served:
                path = None if kind is None else str(tiny(kind))
                configured = Settings(
                    models_dir=tmp_path_factory.mktemp("models"),
                    model_path=str(tiny("llama")),
                    embedding_model_path=path,
                    n_threads=1,
                    n_ctx=512,
                    **settings,
                )
                service = build(configured)
                served[key] = stack.enter_context(serving(service)), service
            return served[key]

        yield start


@pytest.fixture
def client(serve: Serve) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serve('bert')[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def post(address: str, path: str, body: Any) -> tuple[int, Any]:
    answer = httpx.post(f"{address}{path}", json=body, timeout=60)
    return answer.status_code, answer.json()


def test_openais_client_gets_vectors(client: OpenAI) -> None:
    """It asks for base64 by default and decodes it; floats are the same."""
    texts = ["a b c", "another text", "a b c"]

    decoded = client.embeddings.create(model="bert", input=texts)
    floats = client.embeddings.create(model="bert", input=texts, encoding_format="float")

    assert [entry.index for entry in decoded.data] == [0, 1, 2]
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens > 6
    for one, other in zip(decoded.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.isclose(math.hypot(*one.embedding), 1, abs_tol=1e-5)
    first, second, third = (entry.embedding for entry in decoded.data)
    assert first == pytest.approx(third, abs=1e-5)
    assert first != pytest.approx(second, abs=0.01)


def test_many_requests_at_once_get_their_own_vectors(serve: Serve) -> None:
    """Texts of several requests share batches, and a chat is answered meanwhile."""
    texts = [f"text {chr(97 + index) * (index + 1)}" for index in range(20)]

    async def ask() -> tuple[list[list[float]], list[list[float]], Any]:
        async with AsyncOpenAI(base_url=f"{serve('bert')[0]}/v1", api_key="none", timeout=60) as client:
            create = client.embeddings.create
            chat = client.chat.completions.create(
                model="llama", messages=[{"role": "user", "content": "hi"}], max_tokens=4
            )
            *single, answer = await asyncio.gather(*(create(model="bert", input=text) for text in texts), chat)
            together = await create(model="bert", input=texts)
            return [each.data[0].embedding for each in single], [each.embedding for each in together.data], answer

    single, together, chat = asyncio.run(ask())

    assert chat.model == "llama"
    for one, other in zip(single, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_tokens_give_the_vector_of_their_text(client: OpenAI, serve: Serve) -> None:
    embedder = serve("bert")[1].embedder
    assert embedder is not None

    async def encode() -> list[int]:
        lease = await embedder.lease()
        try:
            return lease.engine.encode("a b c")
        finally:
            lease.release()

    tokens = asyncio.run(encode())
    answer = client.embeddings.create(model="bert", input=[tokens])

    assert answer.data[0].embedding == pytest.approx(
        client.embeddings.create(model="bert", input="a b c").data[0].embedding, abs=1e-5
    )


def test_dimensions_are_a_setting(serve: Serve, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="EMBEDDING_MATRYOSHKA"):
        client.embeddings.create(model="bert", input="a", dimensions=8)

    address, _ = serve("bert", embedding_matryoshka=True)
    status, answer = post(address, "/v1/embeddings", {"input": "a", "dimensions": 8})
    assert (status, len(answer["data"][0]["embedding"])) == (200, 8)
    assert math.isclose(math.hypot(*answer["data"][0]["embedding"]), 1, abs_tol=1e-5)


def test_a_text_longer_than_the_model_reads_is_a_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="reads at most 256") as refused:
        client.embeddings.create(model="bert", input=["a", "b " * 300])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input[1]")


def test_the_model_is_loaded_by_its_first_request(serve: Serve) -> None:
    """Until then it is named and not in memory."""
    address, _ = serve("bert-cls", embedding_model_aliases=("embed",))
    ids = [entry["id"] for entry in httpx.get(f"{address}/v1/models").json()["data"]]
    before = httpx.get(f"{address}/health").json()["embeddings"]

    assert post(address, "/embeddings", {"model": "embed", "input": "a"})[0] == 200
    after = httpx.get(f"{address}/health").json()["embeddings"]
    report = httpx.get(f"{address}/models").json()["embeddings"]

    assert ids == ["llama", "bert-cls", "embed"]
    assert (before["status"], before.get("engine")) == ("available", None)
    assert (after["status"], after["leases"]) == ("ready", 0)
    assert after["engine"]["texts"] in (1, 2)  # the second is that of the warm-up, which may not be computed yet
    assert (report["pooling"], report["dimensions"], report["n_ctx"]) == ("cls", 32, 256)


def test_a_reranker_ranks(serve: Serve) -> None:
    address, _ = serve("bert-rank")
    documents = ["some text", "another", "one more text here"]

    status, answer = post(address, "/v1/rerank", {"query": "text", "documents": documents, "return_documents": True})

    assert status == 200, answer
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    assert {result["index"]: result["document"]["text"] for result in answer["results"]} == dict(enumerate(documents))
    assert len(set(scores)) == 3
    status, answer = post(address, "/v1/embeddings", {"input": "a"})
    assert (status, answer["error"]["param"]) == (400, "model")


def test_a_decoder_with_last_token_pooling_embeds(serve: Serve) -> None:
    status, answer = post(serve("llama-last")[0], "/v1/embeddings", {"input": ["a", "x" * 400]})

    assert (status, len(answer["data"])) == (200, 2)
    assert answer["usage"]["prompt_tokens"] == 3 + 402


@pytest.mark.parametrize(
    ("kind", "status", "message"), [("llama", 400, "has no pooling"), ("t5", 503, "encoder-decoder")]
)
def test_another_kind_of_model_says_what_is_wrong(kind: str, status: int, message: str, serve: Serve) -> None:
    """A chat goes on working."""
    address, _ = serve(kind)

    answer = post(address, "/v1/embeddings", {"input": "a"})

    assert answer[0] == status
    assert message in answer[1]["error"]["message"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert post(address, "/v1/chat/completions", chat)[0] == 200


def test_without_an_embedding_model_the_client_learns_the_setting(serve: Serve) -> None:
    address, _ = serve(None)
    with (
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="EMBEDDING_MODEL_PATH"),
    ):
        client.embeddings.create(model="llama", input="a")


@pytest.mark.parametrize("target", ["disk", "memory"])
def test_a_model_is_downloaded_by_its_first_request(target: Any, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """A second start with it on the disk needs no hub."""
    with HubDouble({"org/repo": Repo({"bert.gguf": tiny("bert").read_bytes()})}) as hub:
        settings = Settings(
            models_dir=tmp_path,
            model_path=str(tiny("llama")),
            embedding_model_path="hf://org/repo/bert.gguf",
            hf_endpoint=hub.url,
            model_target=target,
            n_threads=1,
        )
        with serving(build(settings)) as address:
            before = httpx.get(f"{address}/health").json()["embeddings"]
            status, answer = post(address, "/v1/embeddings", {"input": "a", "model": "bert"})
            after = httpx.get(f"{address}/health").json()["embeddings"]

    assert (status, before["status"], after["status"]) == (200, "unloaded", "ready"), answer
    assert (tmp_path / "bert.gguf").exists() == (target == "disk")
    if target == "disk":
        with serving(build(settings)) as address:
            assert post(address, "/v1/embeddings", {"input": "a"})[1]["data"] == answer["data"]


def test_a_downloaded_encoder_does_not_become_the_chat_model(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """It is in MODELS_DIR and was checked when it was published. A reload with it keeps the chat model."""
    with HubDouble({"org/repo": Repo({"bert.gguf": tiny("bert").read_bytes()})}) as hub:
        settings = Settings(
            models_dir=tmp_path,
            model_path=str(tiny("llama")),
            embedding_model_path="hf://org/repo/bert.gguf",
            hf_endpoint=hub.url,
            local_admin=True,
            n_threads=1,
        )
        with serving(build(settings)) as address:
            assert post(address, "/v1/embeddings", {"input": "a"})[0] == 200
            status, answer = post(address, "/reload", {"model_path": "bert.gguf"})
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

            assert (status, answer["error"]["param"]) == (400, "model_path")
            assert "EMBEDDING_MODEL_PATH" in answer["error"]["message"]
            assert post(address, "/v1/chat/completions", chat)[0] == 200


def test_a_missing_file_is_a_503_that_names_the_setting(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    settings = Settings(models_dir=tmp_path, model_path=str(tiny("llama")), embedding_model_path="nowhere.gguf")
    with serving(build(settings)) as address:
        status, answer = post(address, "/v1/embeddings", {"input": "a"})

    assert status == 503
    assert "EMBEDDING_MODEL_PATH" in answer["error"]["message"]
