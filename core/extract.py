"""Extract JSON from a text. The schema constrains generation, and the result is validated against it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from core import session as sessions
from core.chat import new_id, usage
from core.engine.grammar import json_schema
from core.engine.grammar.expansion import MAX_CHECKS, Expansion
from core.engine.interface import Cause, Engine, FinishReason, GenerationRequest, Sampling
from core.engine.prompt import templates
from core.errors import InvalidRequest
from core.service import Service
from core.session import Session
from core.wire.fields import MaxTokens, ResponseFormat, Temperature, Usage, nested_beyond, sampler_temperature

MAX_TOKENS = 1024  # default; a small model that repeats itself would otherwise fill the context
MAX_ERRORS = 20

ANY_OBJECT: dict[str, Any] = {"type": "object"}

# The same for every document of a batch, so that its prefill is cached.
SYSTEM = (
    "You extract data from text. Answer with JSON only. Take every value from the text; "
    "do not invent any. If the text does not tell a value, use null, or an empty string or list."
)


class Example(Struct):
    """A text and the data that should be extracted from it."""

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
                "'response_format.type' must be 'json_object' or 'json_schema' for an extraction.",
                param="response_format.type",
            )
        if self.schema is not None and self.response_format.answer_schema != ANY_OBJECT:
            raise InvalidRequest("Give either 'schema' or a schema in 'response_format', not both.", param="schema")

    @property
    def data_schema(self) -> dict[str, Any]:
        """The JSON Schema of `data`."""
        if self.schema is not None:
            return self.schema
        schema = self.response_format.answer_schema if self.response_format else None
        return ANY_OBJECT if schema is None else schema

    @property
    def schema_field(self) -> str:
        return "schema" if self.schema is not None or self.response_format is None else "response_format"


class Problem(Struct):
    """Where `data` violates the schema, or why it was not validated. `path` is a JSON Pointer into `data`."""

    code: Literal["truncated", "not_json", "schema", "unchecked"]
    message: str
    path: str | None = None


class Extraction(Struct):
    """`data` is `raw` as JSON, or null if `raw` is incomplete because it was cut (`finish_reason` is "length").

    `finish_cause` says what cut it; it is absent otherwise.
    """

    id: str
    created: int
    model: str
    data: Raw
    raw: str
    valid: bool
    finish_reason: FinishReason
    usage: Usage
    errors: list[Problem]
    finish_cause: Cause | UnsetType = UNSET
    object: Literal["extraction"] = "extraction"


class ExtractionDelta(Struct):
    """The next part of `raw`, in a stream."""

    id: str
    created: int
    model: str
    delta: str
    object: Literal["extraction.delta"] = "extraction.delta"


async def check(service: Service, request: ExtractRequest) -> None:
    """Check what needs no loaded model: its name and the schema. Raises InvalidRequest or ModelNotFound."""
    sessions.check_model(service, request.model)
    await asyncio.to_thread(_check_schema, request)


async def begin(service: Service, request: ExtractRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start a request that has passed `check` and wait for its first delta. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy, ModelUnavailable and DeadlineExceeded.
    """
    try:
        return await sessions.begin(
            service, request.model, lambda engine: _generation_request(engine, request, tenant, ends), ends
        )
    except InvalidRequest as error:  # it names a field of a chat: use the extraction's
        error.param = {"messages": "text", "response_format": request.schema_field}.get(error.param or "", error.param)
        raise


async def complete(session: Session, request: ExtractRequest) -> Extraction:
    """Return the validated extraction."""
    events = [event async for event in stream(session, request)]
    assert isinstance(events[-1], Extraction)
    return events[-1]


async def stream(session: Session, request: ExtractRequest) -> AsyncIterator[ExtractionDelta | Extraction]:
    """Yield the raw JSON as it is generated, then the validated extraction."""
    extraction_id, created, model = new_id("extr"), int(time.time()), session.card.name
    raw: list[str] = []
    async for delta in session:
        if delta.text:
            raw.append(delta.text)
            yield ExtractionDelta(extraction_id, created, model, delta.text)
    text, finish_reason = "".join(raw), session.finish_reason or "stop"
    data, errors = await asyncio.to_thread(_validate, text, request.data_schema, finish_reason)
    yield Extraction(
        id=extraction_id,
        created=created,
        model=model,
        data=data,
        raw=text,
        valid=not errors,
        finish_reason=finish_reason,
        usage=usage(session),
        errors=errors,
        finish_cause=UNSET if session.cause is None else session.cause,
    )


def _check_schema(request: ExtractRequest) -> None:
    schema = request.data_schema
    json_schema.grammar(schema, request.schema_field)
    try:
        _validator(msgspec.json.encode(schema))
    except ValueError:
        raise InvalidRequest(
            f"'{request.schema_field}' is not a valid JSON Schema.", param=request.schema_field
        ) from None


def _generation_request(engine: Engine, request: ExtractRequest, tenant: str, ends: float | None) -> GenerationRequest:
    grammar = json_schema.grammar(request.data_schema, request.schema_field)
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
    """Return the prompt, its constant parts first: task, schema, instructions, examples as turns, then the text."""
    system = [SYSTEM]
    if request.data_schema != ANY_OBJECT:
        system.append("The JSON has this schema:\n" + msgspec.json.encode(request.data_schema).decode())
    if request.instructions:
        system.append(request.instructions)
    messages = [{"role": "system", "content": "\n\n".join(system)}]
    for example in request.examples or ():
        messages.append({"role": "user", "content": example.text})
        messages.append({"role": "assistant", "content": _as_written(example.data)})
    messages.append({"role": "user", "content": request.text})
    return messages


def _as_written(data: Any) -> str:
    """Return JSON with the separators of the grammar."""
    import json

    return json.dumps(data, ensure_ascii=False)


@functools.lru_cache(maxsize=64)
def _validator(schema: bytes) -> Any:
    """Build a validator that fetches no remote references (jsonschema_rs would) and matches patterns in linear time."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(
        schema.decode(),
        retriever=_retrieve_nothing,
        validate_formats=True,
        pattern_options=jsonschema_rs.RegexOptions(),
    )


def _retrieve_nothing(uri: str) -> Any:
    raise ValueError("remote schemas are not retrieved")


def _validate(text: str, schema: dict[str, Any], finish_reason: FinishReason) -> tuple[Raw, list[Problem]]:
    """Return the data and its errors.

    The data is returned as generated, without decoding it: a number of 30 digits would lose some of them.
    """
    import json

    nothing = Raw(b"null")
    if finish_reason == "length":
        problem = Problem(
            "truncated", "The answer was cut before it was complete. Raise max_tokens or shorten the text."
        )
    else:
        problem = Problem("not_json", "The answer is not JSON.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return nothing, [problem]
    if finish_reason == "length" and not isinstance(data, dict | list):
        return nothing, [problem]  # a cut number is still a number
    if Expansion(schema).checks(data) > MAX_CHECKS:  # the grammar still holds; `format` is not checked
        message = f"Validating this recursive schema would take more than {MAX_CHECKS} checks, so it was skipped."
        return Raw(text.encode()), [Problem("unchecked", message)]
    try:
        violations = list(islice(_validator(msgspec.json.encode(schema)).iter_errors(data), MAX_ERRORS))
    except UnicodeEncodeError:
        return Raw(text.encode()), [Problem("not_json", "A string in the answer has an unpaired surrogate.")]
    errors = []
    for error in violations:
        path = "".join(f"/{step}" for step in error.instance_path)
        keyword = error.schema_path[-1] if error.schema_path else "schema"
        errors.append(Problem("schema", f"'{path or '/'}' does not satisfy '{keyword}'.", path))
    return Raw(text.encode()), errors
