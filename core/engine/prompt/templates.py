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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.engine.cache import common_prefix
from core.engine.interface import Engine, ModelCard
from core.engine.output.families import FAMILIES, Family
from core.engine.prompt import tools as tool_texts
from core.engine.prompt.capabilities import Capabilities, capabilities, reasoning_key, shows_later_systems
from core.engine.prompt.guard import Guard, strings
from core.engine.prompt.text import LONGEST_TOKEN, bos
from core.errors import InvalidRequest, ModelUnavailable

logger = logging.getLogger("slm.templates")

Messages = list[dict[str, Any]]

# What the server itself passes to templates.
_RESERVED = frozenset(
    (
        *("messages", "tools", "xml_tools", "python_tools", "available_tools", "documents"),
        *("add_generation_prompt", "bos_token", "eos_token"),
    )
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a conversation. `reasoning`: the answer begins inside the model's reasoning."""

    tokens: tuple[int, ...]
    reasoning: bool = False


def prompt(engine: Engine, messages: Messages) -> tuple[int, ...]:
    """Return the tokens of a conversation without tools (see `build`)."""
    return build(engine, messages).tokens


def build(
    engine: Engine,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    family: Family = FAMILIES[-1],
    variables: Mapping[str, Any] | None = None,
    close_reasoning: bool = False,
) -> Prompt:
    """Return the prompt of a conversation, up to where the assistant's answer begins. Call it in a worker thread.

    `messages` are plain dicts with `role`, `content` (a string), and optionally `name`, `tool_calls`, `tool_call_id`,
    `reasoning_content`. `tools` are in OpenAI's shape; what the template cannot show of them, of calls and of results
    becomes text in the form of `family`. `variables` are further ones for the template. With `close_reasoning`, a
    prompt that would end inside reasoning ends after it.
    Raises InvalidRequest if they are too long or the template refuses them, ModelUnavailable if the template is broken
    or does not end.
    """
    card = engine.card
    variables = variables or {}
    # 1) Refuse what cannot fit before anything expensive is done with it.
    _check_length(card, messages, tools, variables)
    for name in _RESERVED.intersection(variables):
        raise InvalidRequest(
            f"'chat_template_kwargs' must not contain '{name}': the server sets it.",
            param=f"chat_template_kwargs.{name}",
        )
    # 2) Mark the names of control tokens.
    guard = Guard(engine)
    messages = [
        {key: value if key == "role" else guard.mark(value) for key, value in message.items()} for message in messages
    ]
    marked_tools, marked_variables = guard.mark(list(tools)), guard.mark(variables)
    if guard.count * 2 > card.n_ctx:  # a name that is cut has at least two tokens; tokenizing them all takes seconds
        raise InvalidRequest(
            f"The messages contain names of control tokens {guard.count} times, but the context holds {card.n_ctx} "
            "tokens. "
            f"{card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )
    # 3) Render.
    text = _render(card, messages, marked_tools, marked_variables, family)
    # 4) See whether the template has opened the reasoning.
    reasoning = _open_reasoning(text, family, guard)
    if reasoning and close_reasoning:
        text = f"{text.rstrip()}\n\n{family.think.closer.strip()}\n\n"
        reasoning = False
    # 5) Tokenize part by part.
    tokens = [] if text.startswith(card.bos) else bos(engine)
    for index, part in enumerate(guard.parts(text)):
        tokens += engine.tokenize(part, special=True, continued=index > 0)
    return Prompt(tuple(tokens), reasoning)


def _check_length(
    card: ModelCard, messages: Messages, tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> None:
    if len(messages) >= card.n_ctx:
        raise InvalidRequest(
            f"'messages' has {len(messages)} items of at least one token each, but the context holds "
            f"{card.n_ctx} tokens.",
            param="messages",
            code="context_length_exceeded",
        )
    values = (value for message in messages for key, value in message.items() if key != "role")
    characters = sum(len(string) for value in (*values, *tools, variables) for string in strings(value))
    if characters > card.n_ctx * LONGEST_TOKEN:
        subject = "messages and tools" if tools else "messages"
        raise InvalidRequest(
            f"The {subject} have {characters} characters, but the context holds {card.n_ctx} tokens, which is at most "
            f"{card.n_ctx * LONGEST_TOKEN} characters. {card.remedy}",
            param="messages",
            code="context_length_exceeded",
        )


def _open_reasoning(text: str, family: Family, guard: Guard) -> bool:
    """Return whether the template's output ends with the opener of reasoning."""
    if family.channels:
        return False
    opener, end = family.think.opener.strip(), text.rstrip()
    return end.endswith(opener) and not guard.is_marked(end, len(end) - len(opener))


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


def _render(card: ModelCard, messages: Messages, tools: list[Any], variables: Mapping[str, Any], family: Family) -> str:
    """Return the template's output. If it refuses the messages or fails on them, show it what it supports."""
    source = card.chat_template
    if source is None:
        messages = _with_reasoning(_with_roles("", messages), None)
        return _chatml(tool_texts.adapt(messages, tools, Capabilities(), family)[0])
    from core.engine.prompt import sandbox  # imports Jinja

    messages = _with_reasoning(messages, reasoning_key(source))
    messages = _with_roles(source, messages)
    leading = _without_later_systems(messages)
    if leading != messages and not shows_later_systems(source, card.bos, card.eos):
        messages = leading
    problem: Exception | None = None
    # 1) Tools and calls as the template shows them, then as text.
    for shown, listed in _shown(card, source, messages, tools, family):
        # 2) System messages as they are, then as part of a user's message.
        for attempt in _alternatives(shown):
            try:
                return sandbox.render(source, _variables(card, attempt, {**variables, **listed}))
            except sandbox.Refused as error:
                problem = problem or error
            except (sandbox.Broken, sandbox.Runaway) as error:
                problem = problem or error
                break
        if isinstance(problem, sandbox.Runaway):
            break
    if isinstance(problem, sandbox.Refused):
        raise InvalidRequest(f"The model's chat template refuses these messages: {problem}", param="messages")
    assert isinstance(problem, sandbox.Broken | sandbox.Runaway)
    raise _failure(card, source, problem) from problem


def _shown(
    card: ModelCard, source: str, messages: Messages, tools: list[Any], family: Family
) -> Iterator[tuple[Messages, dict[str, Any]]]:
    """Yield what a template may be able to show, and the variables with which it lists the tools."""
    if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        yield messages, {}
        return
    yield tool_texts.adapt(messages, tools, capabilities(source, card.bos, card.eos), family)
    yield tool_texts.adapt(messages, tools, Capabilities(), family)


def _variables(card: ModelCard, messages: Messages, others: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tools": None,
        "documents": None,
        **others,
        "messages": messages,
        "add_generation_prompt": True,
        "bos_token": card.bos,
        "eos_token": card.eos,
    }


def _failure(card: ModelCard, source: str, error: Exception) -> InvalidRequest | ModelUnavailable:
    """Return the error of a template that failed. If it works on other messages, it is the client's."""
    from core.engine.prompt import sandbox

    runaway = isinstance(error, sandbox.Runaway)
    if _works(source):
        logger.info("The chat template of %s failed on these messages: %s", card.name, error)
        reason = str(error) if runaway else "fails on them"
        return InvalidRequest(f"The model's chat template cannot format these messages: it {reason}.", param="messages")
    logger.error("The chat template of %s failed: %s", card.name, error)
    reason = f"it {error}" if runaway else "it is broken"
    return ModelUnavailable(
        f"The chat template of model '{card.name}' cannot be used: {reason}. Serve another file of this model.",
        retry_after=None,
    )


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
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _with_roles(source: str, messages: Messages) -> Messages:
    """Rewrite roles that the template does not support."""
    developer = "developer" if "developer" in source else "system"
    roles = {"developer": developer, "function": "tool"}
    return [{**message, "role": roles.get(message["role"], message["role"])} for message in messages]


def _with_reasoning(messages: Messages, key: str | None) -> Messages:
    """Put the reasoning of earlier turns where the template reads it. It is left out if the template does not."""
    changed = []
    for message in messages:
        rest = {name: value for name, value in message.items() if name != "reasoning_content"}
        reasoning = message.get("reasoning_content")
        # gpt-oss refuses reasoning and text next to a call.
        refused = key == "thinking" and bool(message.get("tool_calls")) and bool(message["content"])
        if reasoning and key is not None and not refused:
            rest[key] = reasoning
        changed.append(rest)
    return changed


def _alternatives(messages: Messages) -> Iterator[Messages]:
    """Yield the messages, and then without a leading system message, which Gemma 1 and 2 among others refuse."""
    yield messages
    merged = _without_system(messages)
    if merged is not None:
        yield merged


def _without_later_systems(messages: Messages) -> Messages:
    """Make system messages behind the first message part of the user's message next to them."""
    changed: Messages = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if index and message["role"] in ("system", "developer"):
            waiting.append(message["content"])
        elif waiting and message["role"] == "user":
            changed.append({**message, "content": "\n\n".join((*waiting, message["content"]))})
            waiting = []
        elif waiting:
            _append_user(changed, waiting)
            changed.append(message)
            waiting = []
        else:
            changed.append(message)
    if waiting:
        _append_user(changed, waiting)
    return changed


def _append_user(messages: Messages, texts: list[str]) -> None:
    if messages and messages[-1]["role"] == "user":
        messages[-1] = {**messages[-1], "content": "\n\n".join((messages[-1]["content"], *texts))}
    else:
        messages.append({"role": "user", "content": "\n\n".join(texts)})


def _without_system(messages: Messages) -> Messages | None:
    """Merge the leading system message into the first user message. Return None if there is nothing to merge."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    content = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{**messages[1], "content": content}, *messages[2:]]
