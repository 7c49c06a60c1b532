"""Extract: a text in, JSON out, held to a schema while it is written and validated when it is done."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from core import session as turns
from core.chat import new_id, usage
from core.engine.grammar import json_schema as constraints
from core.engine.grammar.expansion import MAX_CHECKS, Expansion
from core.engine.interface import Engine, FinishReason, GenerationRequest, Sampling
from core.engine.prompt import templates
from core.errors import InvalidRequest
from core.service import Service
from core.session import Session
from core.wire.chat import Usage
from core.wire.fields import MaxTokens, ResponseFormat, Temperature, nested_beyond, sampler_temperature

MAX_TOKENS = 1024  # of an answer, unless the client says otherwise: a small model in a loop would fill the context
MAX_ERRORS = 20

ANY_OBJECT: dict[str, Any] = {"type": "object"}

# The same for every document of a batch, so that its tokens are read once and then cached.
SYSTEM = (
    "You extract data from text. Answer with JSON only. Take every value from the text; "
    "do not invent any. If the text does not tell a value, use null, or an empty string or list."
)


class Example(Struct):
    """A text and what should be extracted from it."""

    text: str
    data: Any


class ExtractRequest(Struct, kw_only=True):
    text: Annotated[str, Meta(min_length=1)]
    schema: dict[str, Any] | None = None
    instructions: str | None = None
    examples: Annotated[list[Example], Meta(max_length=32)] | None = None
    temperature: Temperature | None = None
    max_tokens: MaxTokens | None = None
    stream: bool | None = None
    response_format: ResponseFormat | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for index, example in enumerate(self.examples or ()):
            if nested_beyond(example.data, 64):
                place = f"examples[{index}].data"
                raise InvalidRequest(f"'{place}' may be nested at most 64 deep.", param=place)
        if self.response_format is None:
            return
        if self.response_format.type == "text":
            raise InvalidRequest(
                "'response_format.type' must be 'json_object' or 'json_schema' here: an extraction is JSON.",
                param="response_format.type",
            )
        if self.schema is not None and self.response_format.wanted != ANY_OBJECT:
            raise InvalidRequest("Give either 'schema' or a schema in 'response_format', not both.", param="schema")

    @property
    def wanted(self) -> dict[str, Any]:
        """The schema of `data`."""
        if self.schema is not None:
            return self.schema
        schema = self.response_format.wanted if self.response_format else None
        return ANY_OBJECT if schema is None else schema

    @property
    def schema_field(self) -> str:
        return "schema" if self.schema is not None or self.response_format is None else "response_format"


class Problem(Struct):
    """Where `data` breaks the schema, or why that is unknown. `path` is a JSON pointer into `data`."""

    code: Literal["truncated", "not_json", "schema", "unchecked"]
    message: str
    path: str | None = None


class Extraction(Struct):
    """`data` is `raw` as JSON, null when it is none, which happens only when it was cut (`finish_reason` "length")."""

    id: str
    created: int
    model: str
    data: Raw
    raw: str
    valid: bool
    finish_reason: FinishReason
    usage: Usage
    errors: list[Problem]
    object: Literal["extraction"] = "extraction"


class ExtractionDelta(Struct):
    """A piece of `raw`, in a stream."""

    id: str
    created: int
    model: str
    delta: str
    object: Literal["extraction.delta"] = "extraction.delta"


async def check(service: Service, request: ExtractRequest) -> None:
    """What can be told without the model: its name and the schema. Raises InvalidRequest or ModelNotFound."""
    turns.check_model(service, request.model)
    await asyncio.to_thread(_check_schema, request)


async def begin(service: Service, request: ExtractRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start on what `check` has let pass; returns when the first piece is there. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy and ModelUnavailable.
    """
    try:
        return await turns.begin(
            service, request.model, lambda engine: _generation_request(engine, request, tenant, ends), ends
        )
    except InvalidRequest as error:  # told of a chat's fields; an extraction has its own
        error.param = {"messages": "text", "response_format": request.schema_field}.get(error.param or "", error.param)
        raise


async def complete(turn: Session, request: ExtractRequest) -> Extraction:
    """The extraction, validated."""
    events = [event async for event in stream(turn, request)]
    assert isinstance(events[-1], Extraction)
    return events[-1]


async def stream(turn: Session, request: ExtractRequest) -> AsyncIterator[ExtractionDelta | Extraction]:
    """Pieces of the raw JSON as they come, and at the end the extraction itself."""
    extraction_id, created, model = new_id("extr"), int(time.time()), turn.card.name
    raw: list[str] = []
    finish: FinishReason = "stop"
    async for piece in turn.pieces():
        if piece.text:
            raw.append(piece.text)
            yield ExtractionDelta(extraction_id, created, model, piece.text)
        finish = piece.finish_reason or finish
    text = "".join(raw)
    data, errors = await asyncio.to_thread(_judge, text, request.wanted, finish)
    yield Extraction(extraction_id, created, model, data, text, not errors, finish, usage(turn), errors)


def _check_schema(request: ExtractRequest) -> None:
    schema = request.wanted
    constraints.grammar(schema, request.schema_field)
    try:
        _validator(msgspec.json.encode(schema))
    except ValueError:
        raise InvalidRequest(
            f"'{request.schema_field}' is not a valid JSON Schema.", param=request.schema_field
        ) from None


def _generation_request(engine: Engine, request: ExtractRequest, tenant: str, ends: float | None) -> GenerationRequest:
    grammar = constraints.grammar(request.wanted, request.schema_field)
    engine.check_grammar(grammar)
    return GenerationRequest(
        prompt=templates.prompt(engine, _messages(request)),
        sampling=Sampling(temperature=sampler_temperature(request.temperature or 0.0)),
        max_tokens=request.max_tokens or MAX_TOKENS,
        grammar=grammar,
        tenant=tenant,
        deadline=ends,
    )


def _messages(request: ExtractRequest) -> templates.Messages:
    """From the constant to what differs: the task, the schema, instructions, examples as turns, the text."""
    system = [SYSTEM]
    if request.wanted != ANY_OBJECT:
        system.append("The JSON has this schema:\n" + msgspec.json.encode(request.wanted).decode())
    if request.instructions:
        system.append(request.instructions)
    messages = [{"role": "system", "content": "\n\n".join(system)}]
    for example in request.examples or ():
        messages.append({"role": "user", "content": example.text})
        messages.append({"role": "assistant", "content": _as_written(example.data)})
    messages.append({"role": "user", "content": request.text})
    return messages


def _as_written(data: Any) -> str:
    """JSON with the separators that the grammar uses."""
    import json

    return json.dumps(data, ensure_ascii=False)


@functools.lru_cache(maxsize=64)
def _validator(schema: bytes) -> Any:
    """Never fetches what a schema refers to (jsonschema_rs would), and matches patterns in linear time."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(
        schema.decode(),
        retriever=_retrieve_nothing,
        validate_formats=True,
        pattern_options=jsonschema_rs.RegexOptions(),
    )


def _retrieve_nothing(uri: str) -> Any:
    raise ValueError("remote schemas are not retrieved")


def _judge(text: str, schema: dict[str, Any], finish: FinishReason) -> tuple[Raw, list[Problem]]:
    """The data and what is wrong with it, in our words.

    The data is passed on as it was written: a number of 30 digits has no other form that keeps them.
    """
    import json

    nothing = Raw(b"null")
    if finish == "length":
        problem = Problem("truncated", "The answer was cut before it ended; raise max_tokens or shorten the text.")
    else:
        problem = Problem("not_json", "The answer is not JSON.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return nothing, [problem]
    if finish == "length" and not isinstance(data, dict | list):
        return nothing, [problem]  # a number may be whole, or half of one
    if Expansion(schema).checks(data) > MAX_CHECKS:  # what the grammar holds is kept; `format` is not looked at
        words = f"The schema's recursion would take more than {MAX_CHECKS} checks of this answer; it was not validated."
        return Raw(text.encode()), [Problem("unchecked", words)]
    try:
        broken = list(islice(_validator(msgspec.json.encode(schema)).iter_errors(data), MAX_ERRORS))
    except UnicodeEncodeError:
        return Raw(text.encode()), [Problem("not_json", "A string in the answer holds half a surrogate pair.")]
    found = []
    for error in broken:
        path = "".join(f"/{step}" for step in error.instance_path)
        keyword = error.schema_path[-1] if error.schema_path else "schema"
        found.append(Problem("schema", f"'{path or '/'}' does not satisfy '{keyword}'.", path))
    return Raw(text.encode()), found
