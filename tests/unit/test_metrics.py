"""Metrics: Prometheus text whose counters equal the requests made, the access log's fields, and who may read them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters import logs
from adapters.serving.asgi import create_app
from core.engine.interface import GenerationRequest, Sampling
from core.engine.llama import Llama
from core.metrics import CONTENT_TYPE, FinishedRequest, Histogram, Load, Metrics, token_intervals
from core.service import Service
from core.settings import Settings, keys
from core.store.directory import LocalModel
from handlers.dispatch import dispatch
from handlers.http import Request
from handlers.metrics import load_of
from tests.fakes import FakeHost, ScriptedEmbedder, ScriptedEngine, fake_service

JSON = {"content-type": "application/json", "host": "localhost"}
LOCAL = {"client": "127.0.0.1"}


async def post(service: Service, path: str, body: dict[str, Any]) -> bytes:
    request = Request("POST", path, "req_1", JSON, body=json.dumps(body).encode(), **LOCAL)
    response = await dispatch(service, request)
    try:
        if isinstance(response.body, bytes):
            return response.body
        return b"".join([chunk async for chunk in response.body])
    finally:
        await response.aclose()


async def scrape(service: Service) -> dict[str, list[Sample]]:
    """Return the samples of /metrics by the name of their family."""
    response = await dispatch(service, Request("GET", "/metrics", "req_1", {"host": "localhost"}, **LOCAL))
    assert response.status == 200
    assert dict(response.headers)["content-type"] == CONTENT_TYPE
    assert isinstance(response.body, bytes)
    return parse(response.body.decode())


def parse(text: str) -> dict[str, list[Sample]]:
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def value(samples: dict[str, list[Sample]], family: str, suffix: str = "", **labels: str) -> float:
    """Return one sample, e.g. `value(samples, "slm_request_success", "_total", finished_reason="stop")`."""
    (sample,) = (
        sample
        for sample in samples[family]
        if sample.name == family + suffix and labels.items() <= sample.labels.items()
    )
    return sample.value


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}


def test_counters_equal_the_requests_made() -> None:
    """Of every route that runs the model, streamed or not, with its tokens and its finish reason."""

    async def go() -> tuple[dict[str, list[Sample]], int, int]:
        service = fake_service(ScriptedEngine('{"a": 1} x', cached_tokens=3)).service
        bodies = (chat(), chat(max_tokens=2), chat(n=2))
        usages = [json.loads(await post(service, "/v1/chat/completions", body))["usage"] for body in bodies]
        usages.append(json.loads(await post(service, "/v1/extract", {"text": "a is 1"}))["usage"])
        streamed = await post(
            service, "/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True})
        )
        usages.append(json.loads(streamed.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"])
        prompt = sum(usage["prompt_tokens"] for usage in usages)
        return await scrape(service), prompt, sum(usage["completion_tokens"] for usage in usages)

    samples, prompt, completion = asyncio.run(go())

    assert value(samples, "slm_request_success", "_total", finished_reason="stop") == 4
    assert value(samples, "slm_request_success", "_total", finished_reason="length") == 1
    assert value(samples, "slm_prompt_tokens", "_total") == prompt
    assert value(samples, "slm_generation_tokens", "_total") == completion
    assert value(samples, "slm_prefix_cache_queries", "_total") == prompt
    assert value(samples, "slm_prefix_cache_hits", "_total") == 5 * 3
    for family in (
        "slm_time_to_first_token_seconds",
        "slm_e2e_request_latency_seconds",
        "slm_request_queue_time_seconds",
        "slm_request_prefill_time_seconds",
        "slm_request_decode_time_seconds",
        "slm_request_inference_time_seconds",
        "slm_request_prompt_tokens",
        "slm_request_generation_tokens",
    ):
        assert value(samples, family, "_count") == 5, family
        assert value(samples, family, "_bucket", le="+Inf") == 5
    assert value(samples, "slm_request_prompt_tokens", "_sum") == prompt
    assert value(samples, "slm_request_inference_time_seconds", "_sum") == pytest.approx(5 * 0.005)


def test_the_only_label_from_outside_is_the_models_own_name() -> None:
    """An alias that a client chose makes no series."""

    async def go() -> dict[str, list[Sample]]:
        service = fake_service(model_aliases=("*",)).service
        await post(service, "/v1/chat/completions", chat(model="a name that a client made up"))
        return await scrape(service)

    labels = {
        (name, text)
        for samples in asyncio.run(go()).values()
        for sample in samples
        for name, text in sample.labels.items()
        if name != "le"
    }
    assert labels == {("model_name", "fake-1b"), ("finished_reason", "stop")}


def test_a_client_that_leaves_counts_as_an_abort() -> None:
    """Its tokens count."""

    async def go() -> dict[str, list[Sample]]:
        service = fake_service(ScriptedEngine(endless=True)).service
        request = Request(
            "POST", "/v1/chat/completions", "req_1", JSON, body=json.dumps(chat(stream=True)).encode(), **LOCAL
        )
        response = await dispatch(service, request)
        assert not isinstance(response.body, bytes)
        await anext(response.body)
        await response.aclose()
        return await scrape(service)

    samples = asyncio.run(go())
    assert value(samples, "slm_request_success", "_total", finished_reason="abort") == 1
    assert value(samples, "slm_generation_tokens", "_total") >= 1


@pytest.mark.parametrize(
    ("engine", "body", "code"),
    [
        (ScriptedEngine(), chat(messages=[{"role": "user", "content": "x" * 600}]), "context_length_exceeded"),
        (ScriptedEngine(error=RuntimeError("a bug")), chat(), "internal_error"),
    ],
)
def test_errors_are_counted_by_their_code(engine: ScriptedEngine, body: dict[str, Any], code: str) -> None:
    """Requests without a first token are in no histogram."""

    async def go() -> dict[str, list[Sample]]:
        service = fake_service(engine).service
        await post(service, "/v1/chat/completions", body)
        return await scrape(service)

    samples = asyncio.run(go())
    assert value(samples, "slm_request_failure", "_total", code=code) == 1
    assert samples["slm_request_success"] == []
    assert value(samples, "slm_e2e_request_latency_seconds", "_count") == 0


def test_counters_survive_a_swap() -> None:
    """/reload makes a new engine; the series of the old model stay, and the gauges are the new one's."""

    async def go() -> dict[str, list[Sample]]:
        fake = fake_service()
        await post(fake.service, "/v1/chat/completions", chat())
        fake.store.models = (LocalModel("other.gguf", Path("/models/other.gguf"), 1000),)
        await post(fake.service, "/reload", {"model_path": "other.gguf"})
        await post(fake.service, "/v1/chat/completions", chat())
        return await scrape(fake.service)

    samples = asyncio.run(go())
    assert value(samples, "slm_request_success", "_total", model_name="fake-1b") == 1
    assert value(samples, "slm_request_success", "_total", model_name="other") == 1
    assert value(samples, "slm_num_requests_running", model_name="other") == 0


def test_embeddings_are_counted_under_their_own_model() -> None:
    """Tokens and latency; a refused request by its code."""

    async def go() -> tuple[dict[str, list[Sample]], dict[str, Any]]:
        service = fake_service(embedder=ScriptedEmbedder()).service
        answer = json.loads(await post(service, "/v1/embeddings", {"input": ["one", "two"]}))
        await post(service, "/v1/embeddings", {"input": "one", "dimensions": 4000})
        return await scrape(service), answer

    samples, answer = asyncio.run(go())
    name = answer["model"]
    assert value(samples, "slm_request_success", "_total", model_name=name) == 1
    assert value(samples, "slm_prompt_tokens", "_total", model_name=name) == answer["usage"]["prompt_tokens"]
    assert value(samples, "slm_e2e_request_latency_seconds", "_count", model_name=name) == 1
    assert value(samples, "slm_time_to_first_token_seconds", "_count", model_name=name) == 0
    assert value(samples, "slm_request_failure", "_total", model_name=name, code="invalid_request_error") == 1
    assert value(samples, "slm_num_requests_running", model_name=name) == 0


def test_without_a_model_there_are_no_gauges_and_nothing_is_loaded() -> None:
    """A scrape is no reason to load."""
    host = FakeHost(None)
    samples = asyncio.run(scrape(fake_service(host=host).service))

    assert samples["slm_num_requests_running"] == []
    assert not host.started
    assert host.leases == 0


def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it() -> None:
    """A bound belongs to its own bucket, as Prometheus's `le` says; counts add up from bucket to bucket."""
    metrics, intervals = Metrics(), token_intervals()
    for seconds in (0.001, 0.0011, 0.3, 1000.0):
        intervals.observe(seconds)
    metrics.finished(FinishedRequest("m", "stop", 5, 2, 4, 0.5, 2.0, 0.1, 0.4, 1.5, intervals))
    samples = parse(metrics.text([Load("m", 1, 2, 0.25)]))
    buckets = {
        sample.labels["le"]: sample.value
        for sample in samples["slm_inter_token_latency_seconds"]
        if sample.name.endswith("_bucket")
    }

    assert [buckets[bound] for bound in ("0.001", "0.0025", "0.2", "0.3", "80", "+Inf")] == [1, 2, 2, 3, 3, 4]
    assert list(buckets.values()) == sorted(buckets.values())
    assert value(samples, "slm_inter_token_latency_seconds", "_sum") == pytest.approx(1000.3021)
    assert value(samples, "slm_num_requests_running") == 1
    assert value(samples, "slm_num_requests_waiting") == 2
    assert value(samples, "slm_kv_cache_usage_perc") == 0.25


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_an_engines_load_is_above_zero_while_it_runs_and_zero_after(
    tiny_engine: Callable[..., Llama], kind: str
) -> None:
    """The gauges are those of the scheduler; a state that does not grow counts by its slots."""
    engine = tiny_engine(kind, n_ctx=2048, n_parallel=2)

    async def go() -> tuple[Load, Load, Histogram, int]:
        prompt = tuple(engine.tokenize("Hello", special=False))
        forever = Sampling(logit_bias={engine.tokenize("</s>", special=True)[0]: -100.0})
        request = GenerationRequest(prompt, forever, max_tokens=900)
        generation = engine.generate(request)
        first = await anext(generation)
        during = load_of(engine)
        rest = [delta async for delta in generation]
        return during, load_of(engine), generation.token_intervals, sum(delta.tokens for delta in (first, *rest))

    during, after, intervals, tokens = asyncio.run(go())
    assert (during.running, during.waiting) == (1, 0)
    assert 0 < during.kv_usage <= 1
    assert after == Load(kind, 0, 0, 0.0)
    assert tokens - 1 <= sum(intervals.counts) <= tokens  # an end-of-turn token is a step, too
    assert intervals.sum > 0


def test_text_is_escaped() -> None:
    """A model's name may have quotes and backslashes: it is a file's."""
    metrics = Metrics()
    name = 'a"b\\c\nd'
    metrics.finished(
        FinishedRequest(name, "stop", 1, 0, 1, 0.1, 0.1, 0.1, 0.1, 0.1, Histogram(token_intervals().bounds))
    )

    assert value(parse(metrics.text([])), "slm_prompt_tokens", "_total", model_name=name) == 1


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({"metrics_keys": keys("scrape"), "api_keys": keys("use")}, "scrape", 200),
        ({"metrics_keys": keys("scrape"), "api_keys": keys("use")}, "use", 403),
        ({"metrics_keys": keys("scrape"), "api_keys": keys("use")}, "other", 401),
        ({"metrics_keys": keys("scrape"), "api_keys": keys("use")}, None, 401),
        ({"metrics_keys": keys("scrape")}, "scrape", 200),
        ({"metrics_keys": keys("scrape")}, None, 401),
        ({"metrics_keys": keys("scrape"), "admin_api_keys": keys("boss")}, "boss", 200),
        ({"admin_api_keys": keys("boss")}, "boss", 200),
        ({"admin_api_keys": keys("boss"), "api_keys": keys("use")}, "use", 403),
        ({"admin_api_keys": keys("boss")}, None, 401),
        ({"api_keys": keys("use")}, "use", 403),
        ({}, None, 403),
        ({"metrics_keys": keys("scrape"), "iam_auth": True}, "scrape", 403),
    ],
)
def test_who_may_read_them(settings: dict[str, Any], key: str | None, status: int) -> None:
    """A metrics key or an admin key, over any name of the server; never a key for use."""
    headers = {"host": "slm:8000" if key == "scrape" else "localhost"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    service = fake_service(local_admin=False, **settings).service
    response = asyncio.run(dispatch(service, Request("GET", "/metrics", "req_1", headers, client="10.0.0.1")))

    assert response.status == status


def test_a_metrics_key_opens_nothing_else() -> None:
    """Neither the model nor the administrators' routes."""
    service = fake_service(
        local_admin=False, metrics_keys=keys("scrape"), api_keys=keys("use"), admin_api_keys=keys("boss")
    ).service
    headers = {"x-api-key": "scrape", **JSON}
    statuses = [
        asyncio.run(dispatch(service, Request(method, path, "req_1", headers, body=b"{}"))).status
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/reload"))
    ]

    assert statuses == [401, 401, 401]


async def log_lines(settings: Settings) -> list[dict[str, Any]]:
    """Return the JSON log lines of a chat through the ASGI application."""
    stream, logger = io.StringIO(), logging.getLogger("slm.access")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.Json(settings.emf_namespace))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        app = create_app(fake_service(ScriptedEngine(cached_tokens=3)).service)
        body = json.dumps(chat()).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
        }
        incoming = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            return await asyncio.Future()

        async def send(message: Any) -> None:
            pass

        await app(scope, receive, send)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_requests_log_line_has_the_same_fields() -> None:
    """One line, with tokens and times."""
    [line] = asyncio.run(log_lines(Settings()))

    assert {name: line[name] for name in ("model", "cached_tokens", "completion_tokens", "finish_reason")} == {
        "model": "fake-1b",
        "cached_tokens": 3,
        "completion_tokens": 3,
        "finish_reason": "stop",
    }
    assert (line["queue_ms"], line["prefill_ms"], line["decode_ms"]) == (1.0, 2.0, 3.0)
    assert 0 <= line["first_token_ms"] <= line["latency_ms"] <= line["ms"]
    assert "_aws" not in line


def test_with_a_namespace_the_line_is_an_emf_document() -> None:
    """CloudWatch reads each metric from the line's own root, so each name and dimension must be there, as a number."""
    [line] = asyncio.run(log_lines(Settings(emf_namespace="slm")))
    [directive] = line["_aws"]["CloudWatchMetrics"]

    assert directive["Namespace"] == "slm"
    assert directive["Dimensions"] == [["model"]]
    assert isinstance(line["model"], str)
    assert {metric["Unit"] for metric in directive["Metrics"]} == {"Count", "Milliseconds"}
    for metric in directive["Metrics"]:
        assert math.isfinite(line[metric["Name"]])
    assert abs(line["_aws"]["Timestamp"] / 1000 - time.time()) < 60
