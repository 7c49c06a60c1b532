"""llama-server's /infill: the request that llama.vim and llama-vscode send, and the answer that they read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from core.engine.interface import Cause, FinishReason, Timings
from core.wire.fields import (
    Bias,
    Penalty,
    Probability,
    RepeatPenalty,
    Seed,
    StopString,
    Temperature,
    TopK,
    UnsupportedFields,
    check_unsupported,
)

TEMPERATURE = 0.8  # llama-server's default

StopType = Literal["eos", "word", "limit"]


class ExtraFile(Struct):
    """A piece of another file. Unlisted fields (`time`) have no effect."""

    text: str
    filename: str = "tmp"


class InfillRequest(UnsupportedFields, kw_only=True):
    """Unlisted fields of llama-server's (`samplers`, `cache_prompt`, `t_max_predict_ms`, ...) have no effect."""

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[ExtraFile], Meta(max_length=1024)] | None = None
    prompt: str | None = None  # text after `input_prefix`, usually the current line up to the cursor
    n_predict: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None  # -1: MAX_TOKENS
    model: str | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] | None = None
    logit_bias: dict[str, Bias] | None = None
    stream: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None  # e.g. "content", "timings/prompt_n"

    def __post_init__(self) -> None:
        check_unsupported(self, supported=("n_predict",))


class InfillTimings(Struct):
    """Milliseconds and tokens per second. `cache_n` prompt tokens needed no prefill, `prompt_n` did."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Infill(Struct):
    """The whole answer, or with `stop` false an event of a stream, which has the next piece of `content`."""

    content: str
    model: str
    stop: bool
    index: int = 0
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET  # of the prompt
    tokens_cached: int | UnsetType = UNSET  # of prompt and answer
    truncated: bool | UnsetType = UNSET  # the context was full
    stop_type: StopType | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    timings: InfillTimings | UnsetType = UNSET


def finished(
    content: str,
    model: str,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    generated: int,
    finish_reason: FinishReason,
    cause: Cause | None,
    stopping_word: str | None,
    times: Timings,
) -> Infill:
    """Return the whole answer, or the last event of a stream, whose `content` is what was not sent yet."""
    stop_type: StopType = "limit" if finish_reason == "length" else "eos" if stopping_word is None else "word"
    return Infill(
        content,
        model,
        stop=True,
        tokens_predicted=generated,
        tokens_evaluated=prompt_tokens,
        tokens_cached=prompt_tokens + generated,
        truncated=cause == "context",
        stop_type=stop_type,
        stopping_word=stopping_word or "",
        timings=_timings(prompt_tokens - cached_tokens, cached_tokens, generated, times),
    )


def _timings(prefilled: int, cached: int, generated: int, times: Timings) -> InfillTimings:
    def rates(count: int, ms: float) -> tuple[float, float]:
        return (ms / count, count * 1000 / ms) if count and ms else (0.0, 0.0)

    return InfillTimings(
        cached,
        prefilled,
        times.prefill_ms,
        *rates(prefilled, times.prefill_ms),
        generated,
        times.decode_ms,
        *rates(generated, times.decode_ms),
    )


def chosen(answer: Infill, names: list[str]) -> dict[str, Any]:
    """Return the values of `response_fields` by their names; "timings/prompt_n" is inside of `timings`."""
    tree = msgspec.to_builtins(answer)
    values: dict[str, Any] = {}
    for name in names:
        value = tree
        for step in name.split("/"):
            value = value.get(step, UNSET) if isinstance(value, dict) else UNSET
        if value is not UNSET:
            values[name] = value
    return values
