"""Templates: messages to prompt tokens, by the model's own chat template; ChatML for a model that has none.

Words of a client never become control tokens: a message that says "<|im_end|>" stays text. Each name of a control
token in the client's words gets an unguessable mark in front before the template runs. In the template's output the
text is cut behind the first character of each marked name, and the parts are tokenized one by one. Names without a
mark are the template's own. Names of user-defined tokens count where they are markup ("<think>"); a vocabulary's words,
white space and HTML elements are text.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from core.engine.cache import common_prefix
from core.engine.interface import Engine, ModelCard
from core.engine.prompt.budget import Broken, Refused, Runaway
from core.errors import InvalidRequest, ModelUnavailable

log = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

_TOKEN = 128  # characters in the longest token of the vocabularies known to us (Llama 3: 128 spaces)


def prompt(engine: Engine, messages: Messages) -> tuple[int, ...]:
    """Tokens of the conversation, up to where the assistant speaks. Blocks; call it in a worker thread.

    `messages` are plain dicts with `role`, `content` (a string), and perhaps `name`, `tool_calls`, `tool_call_id`.
    Raises InvalidRequest if the template refuses them, ModelUnavailable if the template is broken or never ends.
    """
    card = engine.card
    if len(messages) >= card.n_ctx:
        raise InvalidRequest(
            f"'messages' has {len(messages)} items and each takes at least one token; the context holds {card.n_ctx}.",
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
    if characters > card.n_ctx * _TOKEN:
        raise InvalidRequest(
            f"The messages have {characters} characters; the context holds {card.n_ctx} tokens, which is at most "
            f"{card.n_ctx * _TOKEN} characters. {card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )
    guard = _Guard(engine)
    messages = [
        {key: value if key == "role" else guard.mark(value) for key, value in message.items()} for message in messages
    ]
    if guard.count * 2 > card.n_ctx:  # a name that is cut is two tokens at least; tokenizing them all takes seconds
        raise InvalidRequest(
            f"The messages name control tokens {guard.count} times; the context holds {card.n_ctx} tokens. "
            f"{card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )
    text = _render(card, messages)
    tokens: list[int] = []
    if card.bos and card.metadata.get("tokenizer.ggml.add_bos_token") == "true" and not text.startswith(card.bos):
        tokens += engine.tokenize(card.bos, special=True)
    for index, part in enumerate(guard.parts(text)):
        tokens += engine.tokenize(part, special=True, continued=index > 0)
    return tuple(tokens)


def stops(card: ModelCard) -> tuple[str, ...]:
    """Stop strings the prompt's form asks for: a model without a template need not have ChatML's control tokens."""
    return ("<|im_end|>", "<|im_start|>") if card.chat_template is None else ()


def shared_prefix(engine: Engine) -> list[int]:
    """The tokens with which every conversation of this template begins that has no system message of its own: the
    template's own words, so nobody's secret. Compiles the template on its way (Jinja's import is 0.18 s of the first
    prompt). A broken template has none, and that is only logged."""
    try:
        one, other = (prompt(engine, [{"role": "user", "content": letter}]) for letter in "aZ")
    except (InvalidRequest, ModelUnavailable) as error:
        log.warning("no prompt can be made for %s: %s", engine.card.name, error.message)
        return []
    return list(one[: common_prefix(list(one), list(other))])


def _render(card: ModelCard, messages: Messages) -> str:
    source = card.chat_template
    if source is None:
        return _chatml(messages)
    messages = _known_to(source, messages)
    try:
        return _run(card, source, messages)
    except Refused as error:
        # Gemma 1 and 2 among others refuse the system role; its words then go in front of the first user message.
        merged = _without_system(messages)
        if merged is not None:
            try:
                return _run(card, source, merged)
            except Refused:
                pass
        raise InvalidRequest(f"The model's chat template refuses these messages: {error}", param="messages") from None


def _run(card: ModelCard, source: str, messages: Messages) -> str:
    from core.engine.prompt import sandbox as jinja

    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": card.bos,
        "eos_token": card.eos,
    }
    try:
        return jinja.render(source, variables)
    except (Runaway, Broken) as error:
        if _works(source):
            log.info("the chat template of %s failed on these messages: %s", card.name, error)
            what = error if isinstance(error, Runaway) else "fails on them"
            raise InvalidRequest(
                f"The model's chat template cannot put these messages in form: it {what}.", param="messages"
            ) from error
        log.error("the chat template of %s failed: %s", card.name, error)
        what = f"it {error}" if isinstance(error, Runaway) else "it is broken"
        raise ModelUnavailable(
            f"The chat template of model '{card.name}' cannot be used: {what}. Serve another file of this model.",
            retry_after=None,
        ) from error


@functools.lru_cache(maxsize=8)
def _works(source: str) -> bool:
    """Whether the template can do the simplest conversation: then a failure is about the messages, not about it."""
    from core.engine.prompt import sandbox as jinja

    messages = [{"role": "user", "content": "Hello"}]
    try:
        jinja.render(source, {"messages": messages, "add_generation_prompt": True, "bos_token": "", "eos_token": ""})
    except (Refused, Runaway, Broken):
        return False
    return True


def _chatml(messages: Messages) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in _known_to("", messages)]
    return "".join(turns) + "<|im_start|>assistant\n"


def _known_to(source: str, messages: Messages) -> Messages:
    """Say in other words what the template does not know: `developer`, `function`, tool calls."""
    developer = "developer" if "developer" in source else "system"
    function = "function" if "'function'" in source or '"function"' in source else "tool"
    other = {"developer": developer, "function": function}
    known = []
    for message in messages:
        message = {**message, "role": other.get(message["role"], message["role"])}
        if "tool_calls" in message and "tool_calls" not in source:
            message["content"] = "\n".join(filter(None, (message["content"], *_told(message.pop("tool_calls")))))
        known.append(message)
    return known


def _told(calls: list[dict[str, Any]]) -> Iterator[str]:
    import json

    for call in calls:
        yield json.dumps(call["function"], ensure_ascii=False)


def _without_system(messages: Messages) -> Messages | None:
    """The leading system message merged into the first user message; None if there is nothing to merge."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    words = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{**messages[1], "content": words}, *messages[2:]]


class _Guard:
    """Marks the names of control tokens in a client's words, and cuts them in two in the template's output.

    The mark goes in front of the name, so that a template that looks for one ("</think>" in what an assistant said)
    still sees it. It is made of digits, which neither `upper` nor `tojson` changes. What a template drops, it drops.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mark = f"{int.from_bytes(os.urandom(8), 'big'):020}"
        self.count = 0  # of marks

    def mark(self, value: Any) -> Any:
        """The value with a mark in front of each name in its strings, keys of objects included."""
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
        """The text without marks, in parts of which none holds a name that was marked."""
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
