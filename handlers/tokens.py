"""POST /tokenize, POST /detokenize and POST /v1/chat/completions/input_tokens"""

from __future__ import annotations

from core import tokens
from core.service import Service
from core.session import deadline
from core.tokens import Prompt
from core.wire import chat as wire
from core.wire.chat import ChatRequest
from core.wire.tokens import DetokenizeRequest, InputTokens, TokenizeRequest
from handlers.http import Request, Response, decode, json_response


async def post_tokenize(service: Service, request: Request) -> Response:
    """Return the tokens of a text, or of the prompt that the messages of a chat become."""
    body = decode(request, TokenizeRequest)
    if body.messages is not None:
        return json_response(tokens.answer(await _chat_prompt(service, request), body))
    return json_response(await tokens.tokenize(service, body, deadline(service.settings, request.deadline)))


async def post_detokenize(service: Service, request: Request) -> Response:
    """Return the text of tokens."""
    body = decode(request, DetokenizeRequest)
    return json_response(await tokens.detokenize(service, body, deadline(service.settings, request.deadline)))


async def post_input_tokens(service: Service, request: Request) -> Response:
    """Return the `prompt_tokens` that the same chat would have."""
    prompt = await _chat_prompt(service, request)
    return json_response(InputTokens(len(prompt.tokens)))


async def _chat_prompt(service: Service, request: Request) -> Prompt:
    body = decode(request, ChatRequest)
    ends = deadline(service.settings, request.deadline)
    return await tokens.prompt(service, body.model, wire.conversation(body), ends)
