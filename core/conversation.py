"""A conversation: the neutral request of all protocols that hold one, and the session that answers it.

Each protocol translates its own request to a `Conversation` and writes its own answer from the session's events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from core import session as sessions
from core import truncation
from core.engine.grammar import json_schema
from core.engine.interface import Engine, GenerationRequest, OutputFormat, Sampling
from core.engine.output.dialect import dialect_of
from core.engine.prompt import templates
from core.errors import InvalidRequest
from core.service import Service
from core.session import Session

Schema = Mapping[str, Any]


class Tool(Struct, frozen=True):
    """A function that the model may call. `parameters` is the JSON Schema of an object.

    With `strict`, every keyword of the schema is enforced or refused; without it, one that cannot be is left out of the
    grammar.
    """

    name: str
    description: str | None
    parameters: Schema
    strict: bool = False


class ToolChoice(Struct, frozen=True):
    """Whether the model calls a tool. `names` narrows which of the tools it may call; None allows all."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None

    @property
    def single(self) -> bool:
        """Whether exactly one call of one tool is demanded, as OpenAI defines a choice that names a function.

        Clients that use such a call as a structured output read only the first one, or join the arguments of all.
        """
        return self.mode == "required" and self.names is not None and len(self.names) == 1


class ReasoningOptions(Struct, frozen=True):
    """The client's options for reasoning.

    `enabled` None leaves it to the template. `budget` is the most tokens of reasoning. `variables` reach the template
    as they are (`chat_template_kwargs`).
    """

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None
    variables: Mapping[str, Any] = {}


class Conversation(Struct, frozen=True):
    """Messages as chat templates expect them, and how to answer the last one.

    A message is a dict with `role` and `content` (a string), and optionally `name`, `reasoning_content`, `tool_calls`
    (each `{"id", "type": "function", "function": {"name", "arguments"}}`, the arguments an object) and `tool_call_id`.
    `schema` constrains the content, `schema_field` is its name in error messages. `tools_field` is the name of the
    i-th tool's parameters. With `truncate`, the oldest turns are dropped if the prompt does not fit.
    """

    messages: templates.Messages
    tools: tuple[Tool, ...] = ()
    tools_field: str = "tools[{}].function.parameters"
    tool_choice: ToolChoice = ToolChoice()
    parallel: bool = True
    schema: dict[str, Any] | None = None
    schema_field: str = "response_format"
    reasoning: ReasoningOptions = ReasoningOptions()
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    truncate: bool = False


async def check(service: Service, model: str | None, conversation: Conversation) -> None:
    """Check what needs no loaded model. Raises InvalidRequest or ModelNotFound."""
    sessions.check_model(service, model)
    n_max = service.settings.n_parallel
    if conversation.n > n_max:
        raise InvalidRequest(f"'n' must be from 1 to {n_max} (N_PARALLEL), got {conversation.n}.", param="n")
    if conversation.schema is not None:
        await asyncio.to_thread(json_schema.grammar, conversation.schema, conversation.schema_field)
    if conversation.tools:
        from core.engine.grammar import tool_schema

        await asyncio.to_thread(tool_schema.check, conversation.tools, conversation.tools_field)


async def begin(
    service: Service, model: str | None, conversation: Conversation, *, tenant: str = "", ends: float | None = None
) -> Session:
    """Start the generation and wait for its first delta. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy, ModelUnavailable and DeadlineExceeded.
    """
    return await sessions.begin(service, model, builder(service, conversation, tenant=tenant, ends=ends), ends)


def builder(
    service: Service, conversation: Conversation, *, tenant: str = "", ends: float | None = None
) -> Callable[[Engine], GenerationRequest]:
    """Return the function that translates the conversation for an engine. It blocks: call it in a worker thread."""
    # Without a limit, a small model that repeats itself fills the context and slows down every other request.
    max_tokens = conversation.max_tokens or service.settings.max_tokens or None

    def build(engine: Engine, messages: templates.Messages) -> GenerationRequest:
        return _generation_request(engine, replace(conversation, messages=messages), max_tokens, tenant, ends)

    if conversation.truncate:
        return lambda engine: truncation.fitted(
            conversation.messages, engine.card.n_ctx, lambda messages: build(engine, messages)
        )
    return lambda engine: build(engine, conversation.messages)


def _generation_request(
    engine: Engine, conversation: Conversation, max_tokens: int | None, tenant: str, ends: float | None
) -> GenerationRequest:
    """Translate the conversation for the engine. Blocks: it renders the template and compiles the grammar."""
    beyond = [token for token in conversation.sampling.logit_bias if token >= engine.card.n_vocab]
    if beyond:
        raise InvalidRequest(
            f"'logit_bias' keys must be token ids from 0 to {engine.card.n_vocab - 1}, got '{beyond[0]}'.",
            param="logit_bias",
        )
    # 1) The prompt. Tools that must not be called are not shown.
    choice, reasoning = conversation.tool_choice, conversation.reasoning
    tools = () if choice.mode == "none" else conversation.tools
    constrained = conversation.schema is not None or (bool(tools) and choice.mode == "required")
    dialect = dialect_of(engine)
    prompt = templates.build(
        engine,
        conversation.messages,
        [_shown(tool) for tool in tools],
        family=dialect.family,
        variables=_variables(reasoning),
        close_reasoning=reasoning.enabled is False or (constrained and not reasoning.enabled),
    )
    # 2) The answer's grammar and format. Reasoning must leave room for an answer that the grammar demands.
    budget = reasoning.budget
    if budget is None and constrained and prompt.reasoning and max_tokens is not None:
        budget = max_tokens // 2
    if not tools and conversation.schema is None and dialect.think is None:
        return _request(engine, conversation, prompt, max_tokens, tenant, ends)
    from core.engine.output import format as output  # most of a chat's code is for what a plain one does not need

    answer = output.Answer(
        tools=tools,
        mode="required" if choice.mode == "required" else "auto",
        parallel=conversation.parallel and not choice.single,
        names=choice.names,
        schema=conversation.schema,
        field=conversation.tools_field,
        schema_field=conversation.schema_field,
        reasoning_budget=budget,
    )
    grammar, form = output.plan(engine, dialect, answer, reasoning_open=prompt.reasoning)
    return _request(engine, conversation, prompt, max_tokens, tenant, ends, grammar, form)


def _request(
    engine: Engine,
    conversation: Conversation,
    prompt: templates.Prompt,
    max_tokens: int | None,
    tenant: str,
    ends: float | None,
    grammar: str | None = None,
    form: OutputFormat | None = None,
) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt.tokens,
        sampling=conversation.sampling,
        max_tokens=max_tokens,
        n=conversation.n,
        stop=(*conversation.stop, *templates.stops(engine.card)),
        grammar=grammar,
        top_logprobs=conversation.top_logprobs,
        tenant=tenant,
        deadline=ends,
        output=form,
    )


def _shown(tool: Tool) -> dict[str, Any]:
    """Return a tool as templates expect it."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _variables(reasoning: ReasoningOptions) -> dict[str, Any]:
    """Return the template's variables. Templates have two names for the switch, and three levels of effort."""
    variables: dict[str, Any] = {}
    if reasoning.enabled is not None:
        variables |= {"enable_thinking": reasoning.enabled, "thinking": reasoning.enabled}
    if reasoning.effort not in (None, "none"):
        variables["reasoning_effort"] = {"minimal": "low", "xhigh": "high"}.get(reasoning.effort, reasoning.effort)
    return {**variables, **reasoning.variables}
