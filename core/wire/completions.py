"""OpenAI's legacy completions: the request, legacy logprobs with their offsets, chunks, and the completion.

A prompt is a string, an array of strings, an array of token ids, or an array of such arrays. Choice `j` of prompt `i`
has the index `i * n + j`.
"""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType

from core.engine.interface import Cause, FinishReason, TokenLogprob
from core.errors import InvalidRequest
from core.wire.fields import (
    Bias,
    Choices,
    Penalty,
    Probability,
    RepeatPenalty,
    ResponseFormat,
    Seed,
    StopString,
    StopStrings,
    StreamOptions,
    Temperature,
    TopK,
    UnsupportedFields,
    Usage,
    check_unsupported,
)

MAX_PROMPTS = 128
MAX_TOKENS = 16  # OpenAI's default

Prompt = str | list[int]


class CompletionRequest(UnsupportedFields, kw_only=True):
    prompt: str | Annotated[list[Any], Meta(min_length=1)]
    model: str | None = None
    suffix: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        check_unsupported(self, supported=("best_of",))
        _check_prompts(self.prompt)
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise InvalidRequest(
                f"'best_of' must be at least 'n', got {self.best_of} and {self.n or 1}.", param="best_of"
            )
        if self.stream and self.candidates > (self.n or 1):
            raise InvalidRequest(
                "'best_of' above 'n' does not work with 'stream': the best are known at the end.", param="best_of"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")

    @property
    def prompts(self) -> list[Prompt]:
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def candidates(self) -> int:
        """How many answers are made for each prompt; the best `n` of them are returned."""
        return self.best_of or self.n or 1


def _check_prompts(prompt: str | list[Any]) -> None:
    if isinstance(prompt, str) or _are_tokens(prompt):
        return
    for index, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and item and _are_tokens(item)):
            raise InvalidRequest(
                f"'prompt[{index}]' must be a string or a non-empty array of token ids, and 'prompt' a string, an "
                "array of strings, an array of token ids, or an array of arrays of token ids.",
                param=f"prompt[{index}]",
            )
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' may hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param="prompt")


def _are_tokens(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


class Logprobs(Struct):
    """Legacy logprobs: four arrays with an entry for each token.

    A prompt's first token has no logprob. `text_offset` is where the token's text begins in the text of the choice, in
    characters. A token that is not whole characters shows as "bytes:\\xe2\\x80".
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Struct):
    """`finish_cause` extends OpenAI's shape: what cut the answer. It is absent unless `finish_reason` is "length"."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    finish_cause: Cause | UnsetType = UNSET


class Completion(Struct):
    """A whole completion, or a chunk of a stream, which has the next piece of one choice."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class Head(NamedTuple):
    """The fields that all chunks of one completion share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def chunk(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self.id, self.created, self.model, choices, self.system_fingerprint, usage)


class Offsets:
    """Assigns offsets to the tokens of one choice, and releases them together with their text.

    A token's text may be held back, because it may begin a stop string. So an offset counts the characters of the
    tokens before, not the text that was sent. Tokens whose text a stop string cut off are dropped.
    """

    def __init__(self, position: int = 0) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._position = position  # of the next token, in characters
        self._sent = position  # characters of the choice's text that have been sent
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()

    def push(self, tokens: Iterable[TokenLogprob], text: str, *, last: bool) -> Logprobs:
        """Add the next tokens and the text that is sent now. Return the tokens that begin in the text so far."""
        for token in tokens:
            self._waiting.append((token, self._position))
            self._position += len(self._decode(b"" if token.control else token.token))
        self._sent += len(text)
        released = Logprobs([], [], [], [])
        complete = last and self._position <= self._sent  # no stop string cut the text
        while self._waiting and (complete or self._waiting[0][1] < self._sent):
            token, offset = self._waiting.popleft()
            _append(released, token, token.logprob, offset)
        return released


def echoed(tokens: Sequence[TokenLogprob], echo: str) -> Logprobs:
    """Return the logprobs of a prompt, whose first token has none. Their texts end where `echo` ends."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    lengths = [len(decode(b"" if token.control else token.token)) for token in tokens]
    logprobs = Logprobs([], [], [], [])
    position = min(0, len(echo) - sum(lengths))  # a vocabulary may put a space in front, which is not in the echo
    for token, length in zip(tokens, lengths, strict=True):
        _append(logprobs, token, token.logprob, max(0, position))
        position += length
    logprobs.token_logprobs[0] = logprobs.top_logprobs[0] = None
    return logprobs


def _append(logprobs: Logprobs, token: TokenLogprob, logprob: float, offset: int) -> None:
    shown = spelled(token.token)
    top: dict[str, float] = {shown: logprob}
    for other, value in token.top:  # the likeliest first; two tokens may have the same text
        top.setdefault(spelled(other), value)
    logprobs.tokens.append(shown)
    logprobs.token_logprobs.append(logprob)
    logprobs.top_logprobs.append(top)
    logprobs.text_offset.append(offset)


def spelled(token: bytes) -> str:
    """Return a token's text, or its bytes in OpenAI's form if they are not whole characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def best(choices: list[Choice], means: Mapping[int, float], candidates: int, n: int) -> list[Choice]:
    """Return for each prompt the `n` of its `candidates` with the highest mean logprob, numbered anew.

    A candidate without tokens has no mean, and comes last.
    """
    chosen: list[Choice] = []
    for start in range(0, len(choices), candidates):
        ranked = sorted(choices[start : start + candidates], key=lambda choice: -means.get(choice.index, -math.inf))
        chosen += ranked[:n]
    for index, choice in enumerate(chosen):
        choice.index = index
    return chosen


def fold(chunks: Sequence[Completion]) -> Completion:
    """Fold the chunks of a finished stream, the last of which holds the usage, into the whole completion."""
    choices: dict[int, Choice] = {}
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            # 1) The first chunk of a choice is its beginning.
            choice = choices.get(part.index)
            if choice is None:
                choices[part.index], texts[part.index] = part, [part.text]
                continue
            # 2) Text and logprobs accumulate.
            texts[part.index].append(part.text)
            if choice.logprobs is not None and part.logprobs is not None:
                for name in Logprobs.__struct_fields__:
                    getattr(choice.logprobs, name).extend(getattr(part.logprobs, name))
            # 3) The last chunk says why the choice ended.
            choice.finish_reason, choice.finish_cause = part.finish_reason, part.finish_cause
    for index, pieces in texts.items():
        choices[index].text = "".join(pieces)
    last = chunks[-1]
    ordered = [choices[index] for index in sorted(choices)]
    return Completion(last.id, last.created, last.model, ordered, last.system_fingerprint, last.usage)
