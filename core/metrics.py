"""Metrics: counters and histograms of the requests that ran, and their Prometheus text.

Names and meanings are vLLM's under the prefix `slm_`. The only label besides a finish reason or an error code is the
model's name, which the operator chooses: keys, prompts and names from clients would make series without bound.
"""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from core.errors import ApiError

Bounds = tuple[float, ...]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of the buckets: vLLM's, and smaller ones, because small models need less than 10 ms for a token.
_SMALL: Bounds = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_TOKEN_S: Bounds = (*_SMALL, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST_TOKEN_S: Bounds = (*_TOKEN_S, 160.0, 640.0, 2560.0)
_REQUEST_S: Bounds = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0)
_REQUEST_S = (*_REQUEST_S, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKENS: Bounds = (*(float(step * 10**power) for power in range(6) for step in (1, 2, 5)), 1e6)


_COUNTERS: dict[str, str] = {
    "prompt_tokens": "Prompt tokens of finished requests.",
    "generation_tokens": "Generated tokens of finished requests.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache held.",
}

_HISTOGRAMS: dict[str, tuple[str, Bounds]] = {
    "time_to_first_token_seconds": ("Time from the request to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Time between two tokens of a sequence.", _TOKEN_S),
    "e2e_request_latency_seconds": ("Time from the request to its last token.", _REQUEST_S),
    "request_queue_time_seconds": ("Time until a slot was free.", _FIRST_TOKEN_S),
    "request_prefill_time_seconds": ("Time from a free slot to the first token.", _FIRST_TOKEN_S),
    "request_decode_time_seconds": ("Time from the first token to the last.", _REQUEST_S),
    "request_inference_time_seconds": ("Time from a free slot to the last token.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request, of all its choices.", _TOKENS),
}


class Histogram:
    """Counts of values by bucket, and their sum. Not thread-safe."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last is of the values above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: Histogram) -> None:
        """Add the counts of a histogram with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


def token_intervals() -> Histogram:
    """Return an empty histogram for the seconds between two tokens of one sequence."""
    return Histogram(_TOKEN_S)


class FinishedRequest(NamedTuple):
    """The measurements of one request. `finish_reason` is "abort" if its client left before the end.

    `cached_tokens` are the prompt tokens that needed no prefill, `completion_tokens` those of all choices. Times are in
    seconds: until the first token and in all since the request began, which includes a wait for the model; then in the
    queue, the prefill and the decode.
    """

    model: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    latency_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    token_intervals: Histogram


class Load(NamedTuple):
    """The current state of an engine. `kv_usage` is the share of its KV cells that running sequences use."""

    model: str
    running: int
    waiting: int
    kv_usage: float


class _Series:
    """The counters and histograms of one model."""

    def __init__(self) -> None:
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self.success: dict[str, int] = {}  # by finish reason
        self.failure: dict[str, int] = {}  # by error code
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}


def error_code(error: BaseException) -> str:
    """Return the code under which a request without a first token is counted."""
    if isinstance(error, ApiError):
        return error.code or error.type
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal_error"


class Metrics:
    """The requests of this process. They outlive a model, so a swap resets nothing. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, _Series] = {}

    def finished(self, request: FinishedRequest) -> None:
        """Count a request that had a first token."""
        with self._lock:
            series = self._models.setdefault(request.model, _Series())
            for name, value in (
                ("prompt_tokens", request.prompt_tokens),
                ("generation_tokens", request.completion_tokens),
                ("prefix_cache_queries", request.prompt_tokens),
                ("prefix_cache_hits", request.cached_tokens),
            ):
                series.counters[name] += value
            series.success[request.finish_reason] = series.success.get(request.finish_reason, 0) + 1
            for name, observed in (
                ("time_to_first_token_seconds", request.first_token_s),
                ("e2e_request_latency_seconds", request.latency_s),
                ("request_queue_time_seconds", request.queue_s),
                ("request_prefill_time_seconds", request.prefill_s),
                ("request_decode_time_seconds", request.decode_s),
                ("request_inference_time_seconds", request.prefill_s + request.decode_s),
                ("request_prompt_tokens", request.prompt_tokens),
                ("request_generation_tokens", request.completion_tokens),
            ):
                series.histograms[name].observe(observed)
            series.histograms["inter_token_latency_seconds"].add(request.token_intervals)

    def embedded(self, model: str, prompt_tokens: int, latency_s: float) -> None:
        """Count a request that computed vectors. It generates no tokens, so it is in fewer histograms."""
        with self._lock:
            series = self._models.setdefault(model, _Series())
            series.counters["prompt_tokens"] += prompt_tokens
            series.success["stop"] = series.success.get("stop", 0) + 1
            series.histograms["e2e_request_latency_seconds"].observe(latency_s)
            series.histograms["request_prompt_tokens"].observe(prompt_tokens)

    def failed(self, model: str, code: str) -> None:
        """Count a request that ended with an error. `code` is that of `error_code`."""
        with self._lock:
            failure = self._models.setdefault(model, _Series()).failure
            failure[code] = failure.get(code, 0) + 1

    def text(self, loads: Sequence[Load]) -> str:
        """Return all series as Prometheus text, version 0.0.4. `loads` are those of the loaded models."""
        with self._lock:
            lines = [*_gauges(loads), *self._counters(), *self._histograms()]
        return "".join(f"{line}\n" for line in lines)

    def _counters(self) -> Iterator[str]:
        for name, help_text in _COUNTERS.items():
            yield from _head(f"{name}_total", "counter", help_text)
            for model, series in self._models.items():
                yield _sample(f"{name}_total", {"model_name": model}, series.counters[name])
        yield from _head("request_success_total", "counter", "Requests that the model answered, by finish reason.")
        for model, series in self._models.items():
            for reason, count in series.success.items():
                yield _sample("request_success_total", {"model_name": model, "finished_reason": reason}, count)
        yield from _head("request_failure_total", "counter", "Requests that ended with an error, by its code.")
        for model, series in self._models.items():
            for code, count in series.failure.items():
                yield _sample("request_failure_total", {"model_name": model, "code": code}, count)

    def _histograms(self) -> Iterator[str]:
        for name, (help_text, _) in _HISTOGRAMS.items():
            yield from _head(name, "histogram", help_text)
            for model, series in self._models.items():
                yield from _buckets(name, {"model_name": model}, series.histograms[name])


def _gauges(loads: Sequence[Load]) -> Iterator[str]:
    for name, help_text, attribute in (
        ("num_requests_running", "Sequences that are in prefill or decode.", "running"),
        ("num_requests_waiting", "Sequences that wait for a slot.", "waiting"),
        ("kv_cache_usage_perc", "KV cells of running sequences; 1 is all of them.", "kv_usage"),
    ):
        yield from _head(name, "gauge", help_text)
        for load in loads:
            yield _sample(name, {"model_name": load.model}, getattr(load, attribute))


def _head(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP slm_{name} {help_text}", f"# TYPE slm_{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
    return f"slm_{name}{{{pairs}}} {value:.17g}"


def _buckets(name: str, labels: Mapping[str, str], histogram: Histogram) -> Iterator[str]:
    *counts, total = accumulate(histogram.counts)
    for bound, count in zip(histogram.bounds, counts, strict=True):
        yield _sample(f"{name}_bucket", {**labels, "le": f"{bound:.12g}"}, count)
    yield _sample(f"{name}_bucket", {**labels, "le": "+Inf"}, total)
    yield _sample(f"{name}_sum", labels, histogram.sum)
    yield _sample(f"{name}_count", labels, total)


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
