"""Answers in OpenAI's shapes: the completion, its chunks, usage and logprobs. Built from the engine's pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from core.engine.interface import FinishReason, TokenLogprob


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int  # of all choices
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Likely(Struct):
    token: str
    logprob: float
    bytes: list[int]


class Token(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Likely]


class Logprobs(Struct):
    content: list[Token]
    refusal: None = None


class AssistantMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()


class Choice(Struct):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached_tokens)
    )


def logprobs(tokens: Iterable[TokenLogprob]) -> Logprobs:
    """OpenAI's shape. `token` shows half a character as U+FFFD; `bytes` has it exactly."""
    return Logprobs(
        [
            Token(
                token.token.decode(errors="replace"),
                token.logprob,
                list(token.token),
                [Likely(text.decode(errors="replace"), logprob, list(text)) for text, logprob in token.top],
            )
            for token in tokens
        ]
    )
