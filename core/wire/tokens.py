"""Requests and answers of /tokenize, /detokenize and input_tokens, in llama-server's and in vLLM's spelling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from core.errors import InvalidRequest

TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class TokenizeRequest(Struct, kw_only=True):
    """One of `content` (llama-server), `prompt` or `messages` (vLLM). Messages come with the other fields of a chat."""

    content: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    add_special: bool | None = None  # with `content`: put BOS in front if the vocabulary says so; default false
    add_special_tokens: bool | None = None  # the same with `prompt`; default true
    parse_special: bool | None = None  # turn names of control tokens into these tokens; default false
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    def __post_init__(self) -> None:
        names = ("content", "prompt", "messages")
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise InvalidRequest("Send exactly one of 'content', 'prompt' and 'messages'.", param="content")

    @property
    def text(self) -> str:
        return (self.content if self.content is not None else self.prompt) or ""

    @property
    def adds_bos(self) -> bool:
        if self.content is not None:
            return bool(self.add_special)
        return self.add_special_tokens is not False


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


class Piece(Struct):
    """A token and its text, or its bytes if they are not whole characters."""

    id: int
    piece: str | list[int]


class Tokens(Struct):
    """The tokens of a text. llama-server has `tokens` only; the other fields are vLLM's."""

    tokens: list[int | Piece]
    count: int
    max_model_len: int  # how many tokens a request may have
    token_strs: list[str] | None = None


class Detokenized(Struct):
    """The text, under llama-server's name and under vLLM's."""

    content: str
    prompt: str


class InputTokens(Struct):
    """The length of a request's prompt."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


def piece(token: int, data: bytes) -> Piece:
    try:
        return Piece(token, data.decode())
    except UnicodeDecodeError:
        return Piece(token, list(data))
