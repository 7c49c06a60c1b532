"""Turn messages into prompt tokens with the model's chat template, or with ChatML if the model has none.

A client's text never becomes control tokens: a message that contains "<|im_end|>" stays text. Before the template runs,
an unguessable mark is put in front of each name of a control token in the client's strings. The template's output is
cut after the first character of each marked name, and the parts are tokenized separately. Names without a mark are the
template's own. Names of user-defined tokens are treated the same if they are markup ("<think>"), but not if they are
words, white space or HTML elements.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from core.engine.cache import common_prefix
from core.engine.interface import Engine, ModelCard
from core.engine.prompt.text import LONGEST_TOKEN, bos
from core.errors import InvalidRequest, ModelUnavailable

logger = logging.getLogger("slm.templates")

Messages = list[dict[str, Any]]


def prompt(engine: Engine, messages: Messages) -> tuple[int, ...]:
    """Return the tokens of the conversation, up to where the assistant's answer begins. Call it in a worker thread.

    `messages` are plain dicts with `role`, `content` (a string), and optionally `name`, `tool_calls`, `tool_call_id`.
    Raises InvalidRequest if they are too long or the template refuses them, ModelUnavailable if the template is broken
    or does not end.
    """
    card = engine.card
    # 1) Refuse what cannot fit before anything expensive is done with it.
    if len(messages) >= card.n_ctx:
        raise InvalidRequest(
            f"'messages' has {len(messages)} items of at least one token each, but the context holds "
            f"{card.n_ctx} tokens.",
            param="messages",
            code="context_length_exceeded",
        )
    characters = sum(
        len(string)
        for message in messages
        for key, value in message.items()
        if key != "role"
        for string in _strings(value)
    )
    if characters > card.n_ctx * LONGEST_TOKEN:
        raise InvalidRequest(
            f"The messages have {characters} characters, but the context holds {card.n_ctx} tokens, which is at most "
            f"{card.n_ctx * LONGEST_TOKEN} characters. {card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )
    # 2) Mark the names of control tokens.
    guard = _Guard(engine)
    messages = [
        {key: value if key == "role" else guard.mark(value) for key, value in message.items()} for message in messages
    ]
    if guard.count * 2 > card.n_ctx:  # a name that is cut has at least two tokens; tokenizing them all takes seconds
        raise InvalidRequest(
            f"The messages contain names of control tokens {guard.count} times, but the context holds {card.n_ctx} "
            "tokens. "
            f"{card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )
    # 3) Render, and tokenize part by part.
    text = _render(card, messages)
    tokens = [] if text.startswith(card.bos) else bos(engine)
    for index, part in enumerate(guard.parts(text)):
        tokens += engine.tokenize(part, special=True, continued=index > 0)
    return tuple(tokens)


def stops(card: ModelCard) -> tuple[str, ...]:
    """Return stop strings for a model without a template: it may not have ChatML's markers as control tokens."""
    return ("<|im_end|>", "<|im_start|>") if card.chat_template is None else ()


def shared_prefix(engine: Engine) -> list[int]:
    """Return the token prefix common to all conversations without a system message.

    It comes from the template, so sharing it between tenants leaks nothing. Computing it compiles the template, which
    saves the first prompt 0.18 s for Jinja's import. A broken template has no prefix: that is logged.
    """
    try:
        first, second = (prompt(engine, [{"role": "user", "content": letter}]) for letter in "aZ")
    except (InvalidRequest, ModelUnavailable) as error:
        logger.warning("Cannot make a prompt for %s: %s", engine.card.name, error.message)
        return []
    return list(first[: common_prefix(list(first), list(second))])


def _render(card: ModelCard, messages: Messages) -> str:
    source = card.chat_template
    if source is None:
        return _chatml(messages)
    from core.engine.prompt import sandbox  # imports Jinja

    messages = _adapted(source, messages)
    try:
        return _run(card, source, messages)
    except sandbox.Refused as error:
        # Gemma 1 and 2 among others refuse the system role. Put its text in front of the first user message.
        merged = _without_system(messages)
        if merged is not None:
            try:
                return _run(card, source, merged)
            except sandbox.Refused:
                pass
        raise InvalidRequest(f"The model's chat template refuses these messages: {error}", param="messages") from None


def _run(card: ModelCard, source: str, messages: Messages) -> str:
    from core.engine.prompt import sandbox

    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": card.bos,
        "eos_token": card.eos,
    }
    try:
        return sandbox.render(source, variables)
    except (sandbox.Runaway, sandbox.Broken) as error:
        if _works(source):
            logger.info("The chat template of %s failed on these messages: %s", card.name, error)
            reason = error if isinstance(error, sandbox.Runaway) else "fails on them"
            raise InvalidRequest(
                f"The model's chat template cannot format these messages: it {reason}.", param="messages"
            ) from error
        logger.error("The chat template of %s failed: %s", card.name, error)
        reason = f"it {error}" if isinstance(error, sandbox.Runaway) else "it is broken"
        raise ModelUnavailable(
            f"The chat template of model '{card.name}' cannot be used: {reason}. Serve another file of this model.",
            retry_after=None,
        ) from error


@functools.lru_cache(maxsize=8)
def _works(source: str) -> bool:
    """Return whether the template can format the simplest conversation. If so, a failure is due to the messages."""
    from core.engine.prompt import sandbox

    messages = [{"role": "user", "content": "Hello"}]
    try:
        sandbox.render(source, {"messages": messages, "add_generation_prompt": True, "bos_token": "", "eos_token": ""})
    except (sandbox.Refused, sandbox.Runaway, sandbox.Broken):
        return False
    return True


def _chatml(messages: Messages) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in _adapted("", messages)]
    return "".join(turns) + "<|im_start|>assistant\n"


def _adapted(source: str, messages: Messages) -> Messages:
    """Rewrite roles and tool calls that the template does not support: `developer`, `function`, `tool_calls`."""
    developer = "developer" if "developer" in source else "system"
    function = "function" if "'function'" in source or '"function"' in source else "tool"
    roles = {"developer": developer, "function": function}
    adapted = []
    for message in messages:
        message = {**message, "role": roles.get(message["role"], message["role"])}
        if "tool_calls" in message and "tool_calls" not in source:
            message["content"] = "\n".join(filter(None, (message["content"], *_as_text(message.pop("tool_calls")))))
        adapted.append(message)
    return adapted


def _as_text(calls: list[dict[str, Any]]) -> Iterator[str]:
    import json

    for call in calls:
        yield json.dumps(call["function"], ensure_ascii=False)


def _without_system(messages: Messages) -> Messages | None:
    """Merge the leading system message into the first user message. Return None if there is nothing to merge."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    content = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{**messages[1], "content": content}, *messages[2:]]


class _Guard:
    """Marks the names of control tokens in a client's strings, and cuts them in two in the template's output.

    The mark is in front of the name, so a template that looks for a name ("</think>" in an assistant's message) still
    finds it. It consists of digits, which neither `upper` nor `tojson` changes. A template may drop marked text.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mark = f"{int.from_bytes(os.urandom(8), 'big'):020}"
        self.count = 0  # marks so far

    def mark(self, value: Any) -> Any:
        """Return the value with a mark in front of each name in its strings, including keys of objects."""
        if isinstance(value, str):
            starts = self._engine.control_names(value)
            if not starts:
                return value
            self.count += len(starts)
            ends = [*starts[1:], len(value)]
            named = (value[start:end] for start, end in zip(starts, ends, strict=True))
            return self._mark.join((value[: starts[0]], *named))
        if isinstance(value, dict):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        return [self.mark(inner) for inner in value] if isinstance(value, list) else value

    def parts(self, text: str) -> Iterator[str]:
        """Return the text without marks, in parts that cut each marked name in two."""
        part, *named = text.split(self._mark)
        for name in named:
            yield part + name[:1]
            part = name[1:]
        yield part


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
