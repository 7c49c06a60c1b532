"""Define the fields that chat and extract share, as types with ranges. `handlers.validation` explains violations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta, Struct

from core.engine.interface import Sampling, TokenLogprob
from core.errors import InvalidRequest

Temperature = Annotated[float, Meta(ge=0, le=2, description="0 takes the most likely token.")]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(ge=0.1, le=2, description="1 turns it off.")]  # llama.cpp divides by it
TopK = Annotated[int, Meta(ge=-1, le=(1 << 31) - 1, description="0 and -1 turn it off.")]
Seed = Annotated[
    int,
    Meta(ge=-(1 << 63), le=(1 << 63) - 1, description="The same seed and request usually give the same text."),
]
MaxTokens = Annotated[int, Meta(ge=1, le=(1 << 31) - 1, description="The most tokens to generate.")]
Choices = Annotated[int, Meta(ge=1, le=128, description="How many answers; at most N_PARALLEL.")]
TopLogprobs = Annotated[int, Meta(ge=0, le=20, description="How many of the likeliest tokens to return.")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Bias = Annotated[float, Meta(ge=-100, le=100)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024, description="Text that ends the answer.")]
StopStrings = Annotated[list[StopString], Meta(max_length=4)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int  # of all choices, with reasoning
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0) -> Usage:
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
        CompletionTokensDetails(reasoning_tokens),
    )


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class Token(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(Struct):
    content: list[Token]
    refusal: None = None


def logprobs(tokens: Iterable[TokenLogprob]) -> Logprobs:
    """Return logprobs in OpenAI's shape. `token` shows an incomplete character as U+FFFD; `bytes` is exact."""
    return Logprobs(
        [
            Token(
                token.token.decode(errors="replace"),
                token.logprob,
                list(token.token),
                [TopLogprob(text.decode(errors="replace"), logprob, list(text)) for text, logprob in token.top],
            )
            for token in tokens
        ]
    )


class JsonSchema(Struct):
    """OpenAI's wrapper of a schema. The schema is always enforced, with or without `strict`."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None  # used by llama-server, with type json_object

    def __post_init__(self) -> None:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema is None):
            raise InvalidRequest(
                "'response_format.json_schema.schema' is missing; with type 'json_schema' it must be a JSON Schema.",
                param="response_format.json_schema.schema",
            )

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The schema that the answer must match; None for plain text."""
        if self.type == "text":
            return None
        if self.type == "json_schema":
            assert self.json_schema is not None
            return self.json_schema.schema
        return self.schema or {"type": "object"}


class SamplingFields(Protocol):
    """The sampling fields of a request."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: dict[str, float] | None


def sampling(request: SamplingFields, n_vocab: int | None = None) -> Sampling:
    """Translate the request's sampling fields. The defaults of absent fields are those of `Sampling`.

    Without `n_vocab`, the engine checks that the tokens of `logit_bias` are in the vocabulary.
    """
    fields = {
        "temperature": None if request.temperature is None else sampler_temperature(request.temperature),
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": sampler_seed(request.seed),
        "logit_bias": token_bias(request.logit_bias, n_vocab),
    }
    return Sampling(**{name: value for name, value in fields.items() if value is not None})  # type: ignore[arg-type]


def check_tokens(tokens: Iterable[int], n_vocab: int, param: str) -> None:
    """Raise InvalidRequest for the first id that is not a token of the model."""
    for index, token in enumerate(tokens):
        if not 0 <= token < n_vocab:
            raise InvalidRequest(
                f"'{param}[{index}]' must be a token id from 0 to {n_vocab - 1}, got {str(token)[:20]}.", param=param
            )


def token_bias(logit_bias: dict[str, float] | None, n_vocab: int | None) -> dict[int, float]:
    """Return `logit_bias` with token ids as keys. Raises InvalidRequest for a key that is not a token of this model."""
    biases: dict[int, float] = {}
    for key, bias in (logit_bias or {}).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if token < 0 or (n_vocab is not None and token >= n_vocab):
            allowed = "token ids" if n_vocab is None else f"token ids from 0 to {n_vocab - 1}"
            raise InvalidRequest(f"'logit_bias' keys must be {allowed}, got {key[:40]!r}.", param="logit_bias")
        biases[token] = bias
    return biases


def sampler_temperature(temperature: float) -> float:
    """Return the temperature, or 0 below 1e-5: llama.cpp divides the logits by it, and they would overflow."""
    return 0.0 if temperature < 1e-5 else temperature


def sampler_seed(seed: int | None) -> int | None:
    """Reduce a 64-bit seed to llama.cpp's 32 bits. The highest value is left out, because it means a random seed."""
    return None if seed is None else seed % 0xFFFF_FFFF


def nested_beyond(value: Any, levels: int) -> bool:
    """Return whether arrays and objects are nested more than `levels` deep. Works without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return any(isinstance(inner, dict | list) for inner in layer)


INSTEAD: Mapping[str, str] = {
    "repetition_penalty": "use 'repeat_penalty'",
    "max_new_tokens": "use 'max_tokens'",
    "max_output_tokens": "use 'max_tokens'",
    "n_predict": "use 'max_tokens'",
    "system": "send a message with role 'system'",
    "json_schema": "use 'response_format'",
    "guided_json": "use 'response_format'",
    "structured_outputs": "use 'response_format'",
}


class Unsupported(Struct, kw_only=True):
    """A base for fields of other servers that are rejected, unless they have their default or null.

    A class that derives from it lists such fields, with the default that changes nothing. Requests derive from that.
    """


class UnsupportedFields(Unsupported, kw_only=True):
    """The unsupported fields of requests that generate text."""

    # The prompt's form
    chat_template: Any = None
    add_generation_prompt: Any = True
    continue_final_message: Any = False
    documents: Any = []
    system: Any = None

    # Reasoning and style
    reasoning: Any = None
    thinking: Any = None
    verbosity: Any = "medium"
    web_search_options: Any = None

    # The form of the answer
    grammar: Any = ""
    json_schema: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    # The end of the answer
    max_new_tokens: Any = None
    max_output_tokens: Any = None
    n_predict: Any = None
    min_tokens: Any = 0
    ignore_eos: Any = False
    stop_token_ids: Any = []

    # Sampling
    repetition_penalty: Any = 1
    typical_p: Any = 1
    mirostat: Any = 0
    dry_multiplier: Any = 0
    xtc_probability: Any = 0
    dynatemp_range: Any = 0
    best_of: Any = 1
    use_beam_search: Any = False
    allowed_token_ids: Any = None
    bad_words: Any = []


def unsupported(request: type[Unsupported]) -> dict[str, Any]:
    """Return the unsupported fields of a request with the values that change nothing."""
    listed = next(cls for cls in request.__mro__ if Unsupported in cls.__bases__)
    return msgspec.structs.asdict(listed())


def check_unsupported(fields: Unsupported, supported: tuple[str, ...] = ()) -> None:
    """Raise InvalidRequest that names the first field with a value that would change the answer.

    The protocol handles the `supported` ones itself.
    """
    for name, default in unsupported(type(fields)).items():
        if name in supported:
            continue
        value = getattr(fields, name)
        same = value == default and isinstance(value, bool) == isinstance(default, bool)  # 0 is not false in JSON
        if value is not None and not same:
            instead = INSTEAD.get(name, "leave it out")
            raise InvalidRequest(f"'{name}' is not supported and would change the answer; {instead}.", param=name)
