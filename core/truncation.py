"""Drop the oldest turns of a conversation until its prompt fits into the context."""

from __future__ import annotations

from collections.abc import Callable

from core.engine.interface import GenerationRequest
from core.engine.prompt.templates import Messages
from core.errors import InvalidRequest

ANSWER_SHARE = 4  # an answer gets this part of the context at least, or its `max_tokens` if that is less


def fitted(messages: Messages, n_ctx: int, build: Callable[[Messages], GenerationRequest]) -> GenerationRequest:
    """Return the request for as many of the latest turns as fit. Blocks: `build` renders the template.

    Leading system messages and the last turn stay. If these do not fit, the request is returned as `build` makes it,
    or what `build` raises is raised.
    """
    head, turns = split(messages)

    def attempt(dropped: int) -> GenerationRequest | None:
        try:
            request = build([*head, *(message for turn in turns[dropped:] for message in turn)])
        except InvalidRequest as error:
            if error.code != "context_length_exceeded":
                raise
            return None
        room = min(request.max_tokens or n_ctx, n_ctx // ANSWER_SHARE)
        return request if len(request.prompt) + room <= n_ctx else None

    # The fewest turns to drop, by bisection: each attempt renders the whole conversation.
    if (request := attempt(0)) is not None:
        return request
    low, high, best = 1, len(turns) - 1, None
    while low <= high:
        middle = (low + high) // 2
        request = attempt(middle)
        if request is None:
            low = middle + 1
        else:
            high, best = middle - 1, request
    return best or build([*head, *(turns[-1] if turns else ())])


def split(messages: Messages) -> tuple[Messages, list[Messages]]:
    """Return the leading system messages, and the turns: a user's messages with all that answers them."""
    start = 0
    while start < len(messages) and messages[start]["role"] in ("system", "developer"):
        start += 1
    turns: list[Messages] = []
    for index, message in enumerate(messages[start:], start):
        opens = message["role"] == "user" and (index == start or messages[index - 1]["role"] != "user")
        if opens or not turns:
            turns.append([])
        turns[-1].append(message)
    return messages[:start], turns
