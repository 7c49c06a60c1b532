"""GET /metrics of a live server with a tiny model, as llama-server's own tests check theirs."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.wiring import build
from core.settings import Settings, keys
from tests.conftest import MakeModel
from tests.serving import serving

KEY = {"authorization": "Bearer use"}


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return each sample by its name and labels."""
    answer = httpx2.get(f"{url}/metrics", headers={"authorization": "Bearer scrape"})
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def total(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str) -> float:
    """Add up the samples of a name over all labels."""
    return sum(value for (sample, _), value in samples.items() if sample == name)


@pytest.fixture
def settings(tiny: MakeModel, tmp_path: Path) -> Settings:
    return Settings(
        models_dir=tmp_path,
        model_path=str(tiny("control")),
        n_ctx=1024,
        n_threads=1,
        n_parallel=2,
        port=0,
        api_keys=keys("use"),
        metrics_keys=keys("scrape"),
    )


def test_counters_equal_the_requests_made_and_gauges_return_to_zero(settings: Settings) -> None:
    """Six requests at once on two slots, streamed and not, of two routes."""

    def usage(number: int) -> dict[str, Any]:
        if number % 3 == 0:
            answer = httpx2.post(
                f"{url}/v1/extract", json={"text": f"{number}", "max_tokens": 8}, headers=KEY, timeout=60
            )
            return answer.json()["usage"]
        body = {"messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 8}
        if number % 3 == 1:
            return httpx2.post(f"{url}/v1/chat/completions", json=body, headers=KEY, timeout=60).json()["usage"]
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=KEY, timeout=60)
        return json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]

    with serving(build(settings)) as url:
        before = scrape(url)
        with ThreadPoolExecutor(6) as pool:
            usages = list(pool.map(usage, range(6)))
        after = scrape(url)

    prompt_tokens = sum(each["prompt_tokens"] for each in usages)
    completion_tokens = sum(each["completion_tokens"] for each in usages)
    assert total(before, "slm_request_success_total") == 0
    assert total(after, "slm_request_success_total") == 6
    assert total(after, "slm_request_failure_total") == 0
    assert total(after, "slm_prompt_tokens_total") == total(after, "slm_request_prompt_tokens_sum") == prompt_tokens
    assert total(after, "slm_generation_tokens_total") == completion_tokens
    assert total(after, "slm_prefix_cache_hits_total") == sum(
        each["prompt_tokens_details"]["cached_tokens"] for each in usages
    )
    # A step makes one token, or several that a grammar forces.
    assert 0 < total(after, "slm_inter_token_latency_seconds_count") <= completion_tokens
    phases = ("queue", "prefill", "decode")
    assert sum(total(after, f"slm_request_{phase}_time_seconds_sum") for phase in phases) <= total(
        after, "slm_e2e_request_latency_seconds_sum"
    )
    for gauge in ("slm_num_requests_running", "slm_num_requests_waiting", "slm_kv_cache_usage_perc"):
        assert after[gauge, frozenset({("model_name", "control")})] == 0
    assert all(math.isfinite(value) for value in after.values())
    assert all(value >= before.get(sample, 0) for sample, value in after.items())
