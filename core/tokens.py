"""Tokens: tokenize and detokenize text, and count the tokens of a prompt. Nothing here waits for a slot."""

from __future__ import annotations

from typing import NamedTuple

from core import conversation as conversations
from core import session as sessions
from core.conversation import Conversation
from core.engine.interface import Engine
from core.engine.prompt import text
from core.service import Service
from core.wire import tokens as wire
from core.wire.fields import check_tokens
from core.wire.tokens import Detokenized, DetokenizeRequest, Piece, TokenizeRequest, Tokens


class Prompt(NamedTuple):
    """A prompt's tokens, the bytes of each of them, and how many tokens a request may have."""

    tokens: tuple[int, ...]
    pieces: list[bytes]
    n_ctx: int


async def prompt(service: Service, model: str | None, conversation: Conversation, ends: float | None = None) -> Prompt:
    """Return the prompt of a conversation, as the real request prefills it. Every protocol counts with it.

    Its length is the `prompt_tokens` of the real request's usage. Raises InvalidRequest, ModelNotFound and
    ModelUnavailable.
    """
    await conversations.check(service, model, conversation)
    build = conversations.builder(service, conversation)
    return await sessions.borrow(service, model, lambda engine: _shown(engine, build(engine).prompt), ends)


async def tokenize(service: Service, request: TokenizeRequest, ends: float | None = None) -> Tokens:
    """Return the tokens of `content` or `prompt`."""
    param = "prompt" if request.content is None else "content"

    def work(engine: Engine) -> Prompt:
        text.check_length(engine.card, len(request.text), param)
        tokens = text.bos(engine) if request.adds_bos else []
        if request.parse_special:
            tokens += engine.tokenize(request.text, special=True)
        else:
            tokens += text.tokenize(engine, request.text, param=param)
        return _shown(engine, tuple(tokens))

    return answer(await sessions.borrow(service, request.model, work, ends), request)


async def detokenize(service: Service, request: DetokenizeRequest, ends: float | None = None) -> Detokenized:
    """Return the text of the tokens. Control tokens show as their names, incomplete characters as U+FFFD."""

    def work(engine: Engine) -> bytes:
        check_tokens(request.tokens, engine.card.n_vocab, "tokens")
        return b"".join(engine.token_pieces(request.tokens, special=True))

    content = (await sessions.borrow(service, request.model, work, ends)).decode(errors="replace")
    return Detokenized(content, content)


def answer(prompt: Prompt, request: TokenizeRequest) -> Tokens:
    """Return the answer to a request with `content`, `prompt` or `messages`."""
    tokens: list[int | Piece] = [*prompt.tokens]
    if request.with_pieces:
        tokens = [*map(wire.piece, prompt.tokens, prompt.pieces)]
    strings = [piece.decode(errors="replace") for piece in prompt.pieces] if request.return_token_strs else None
    return Tokens(tokens, len(prompt.tokens), prompt.n_ctx, strings)


def _shown(engine: Engine, tokens: tuple[int, ...]) -> Prompt:
    return Prompt(tokens, engine.token_pieces(tokens, special=True), engine.card.n_ctx)
