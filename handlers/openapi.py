"""GET /openapi.json: the document of the HTTP API, made from the routes, their operations and the structs they name."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from importlib import import_module
from typing import Any

import msgspec
from msgspec import inspect

from core import errors
from core.errors import ApiError
from core.service import Service
from core.version import VERSION
from core.wire.fields import Unsupported, unsupported
from handlers.http import Request, Response
from handlers.operations import OPERATIONS, Operation, Parameter
from handlers.routes import ROUTES, Route

Schema = dict[str, Any]

_REF = "#/components/schemas/{name}"

# OpenAI's envelope, see `core.errors.ApiError.body`.
_ERROR: Schema = {
    "title": "Error",
    "description": "OpenAI's error envelope. `param` names the field that is to blame.",
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key: `Authorization: Bearer KEY`."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key: `x-api-key: KEY`."},
}

_ACCESS = {
    "open": "Needs no key.",
    "user": "Needs one of API_KEYS if the server has any.",
    "metrics": "Needs one of METRICS_KEYS or ADMIN_API_KEYS.",
    "admin": "Needs one of ADMIN_API_KEYS.",
}


async def get_openapi(service: Service, request: Request) -> Response:
    """Return the document. It contains no secrets and is the same on every server of this version."""
    return Response(200, (("content-type", "application/json"),), await asyncio.to_thread(encoded))


@functools.cache
def encoded() -> bytes:
    return msgspec.json.encode(document())


@functools.cache
def document() -> dict[str, Any]:
    """Return the document. It imports every protocol, so it is built on the first request for it."""
    schemas = _schemas()
    responses: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        operation = OPERATIONS[f"{route.method} {route.path}"]
        described = _operation(route, operation, schemas, responses)
        paths.setdefault(operation.path or route.path, {})[route.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "slm-api-server",
            "version": VERSION,
            "description": "A private, OpenAI-compatible API for small language models. Unknown fields of a request "
            "are ignored unless its schema forbids them. A field that would change the answer and is not supported is "
            "a 400.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas.components, "responses": responses, "securitySchemes": _SECURITY_SCHEMES},
    }


class Schemas:
    """The JSON Schemas of all types that the operations name. `references` has those of "module:Class"."""

    def __init__(self, requests: Iterable[str], answers: Iterable[str]) -> None:
        accepted, returned = ({name: _load(name) for name in names} for names in (requests, answers))
        types = accepted | returned
        structs = list(_structs(types.values()))
        schemas, components = msgspec.json.schema_components((*types.values(), *structs), ref_template=_REF)
        self.references: dict[str, Schema] = dict(zip(types, schemas, strict=False))
        self.components: dict[str, Schema] = {"Error": _ERROR, **components}
        names = {
            cls: schema["$ref"].rpartition("/")[2] for cls, schema in zip(structs, schemas[len(types) :], strict=True)
        }
        for component in components.values():
            _raise_descriptions(component)
        # Add what msgspec's schemas do not say.
        in_requests = set(_structs(accepted.values()))
        for cls in structs:
            if cls not in in_requests:
                _require_all(cls, self.components[names[cls]])
            elif issubclass(cls, Unsupported):
                _restrict_unsupported(cls, self.components[names[cls]])


def _raise_descriptions(schema: Schema) -> None:
    """Move the description of a field that may be null from its type to the field."""
    for field in schema.get("properties", {}).values():
        for option in field.get("anyOf", ()):
            if "description" in option and "description" not in field:
                field["description"] = option.pop("description")


def _restrict_unsupported(cls: type[Unsupported], schema: Schema) -> None:
    """Restrict each unsupported field to the values that change nothing: its default and null."""
    declared = {field.encode_name: field for field in msgspec.structs.fields(cls)}
    for name, default in unsupported(cls).items():
        if declared[name].type is Any:
            values = [default] if default is None else [default, None]
            schema["properties"][name] = {"enum": values, "default": default, "description": "Not supported."}


def _require_all(cls: type, schema: Schema) -> None:
    """Mark all fields of an answer as required, except those that may be UNSET. Fields with defaults are sent too."""
    if not cls.__struct_config__.omit_defaults:  # type: ignore[attr-defined]
        properties = schema["properties"]
        always = [name for name in properties if name in schema["required"] or "default" in properties[name]]
        schema["required"] = always
    for field in schema["properties"].values():
        field.pop("default", None)


def _structs(types: Iterable[Any]) -> Iterator[type]:
    """Yield the structs that occur in `types`, each once."""
    seen: set[type] = set()
    todo: list[Any] = list(inspect.multi_type_info(types))
    while todo:
        info = todo.pop()
        if isinstance(info, inspect.StructType):
            if info.cls in seen:
                continue
            seen.add(info.cls)
            yield info.cls
            todo.extend(field.type for field in info.fields)
        todo.extend(
            getattr(info, name) for name in ("type", "item_type", "key_type", "value_type") if hasattr(info, name)
        )
        todo.extend(inner for name in ("types", "item_types") for inner in getattr(info, name, ()))


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _schemas() -> Schemas:
    operations = tuple(OPERATIONS.values())
    requests = [operation.request for operation in operations if operation.request]
    answers = [
        name
        for operation in operations
        for name in (operation.answer, operation.error, *operation.events)
        if name is not None
    ]
    return Schemas(requests, answers)


def _operation(route: Route, operation: Operation, schemas: Schemas, responses: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method} {operation.path or route.path}".lower()).strip("_"),
        "summary": operation.summary,
        "description": _ACCESS[route.access],
        "security": [] if route.access == "open" else [{name: []} for name in _SECURITY_SCHEMES],
        "responses": {"200": _answer(operation, schemas), **_errors(route, operation, schemas, responses)},
    }
    if operation.parameters:
        described["parameters"] = [
            _parameter(parameter, operation.path or route.path) for parameter in operation.parameters
        ]
    if operation.request is not None:
        content: dict[str, Any] = {"schema": schemas.references[operation.request]}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _parameter(parameter: Parameter, path: str) -> dict[str, Any]:
    in_path = f"{{{parameter.name}}}" in path
    return {
        "name": parameter.name,
        "in": "path" if in_path else "query",
        "required": in_path,
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _answer(operation: Operation, schemas: Schemas) -> dict[str, Any]:
    """Describe the answer. The schema of a stream is that of one event, an object with `data` and perhaps `event`."""
    if operation.answer is not None:
        schema = schemas.references[operation.answer]
    else:
        schema = {"type": "object" if operation.media_type == "application/json" else "string"}
    if operation.selector is not None:
        selected = {"type": "object", "description": f"The fields that `{operation.selector}` names."}
        schema = {"anyOf": [schema, selected]}
    content: dict[str, Any] = {operation.media_type: {"schema": schema}}
    if operation.events:
        content["text/event-stream"] = {"schema": _event(operation, schemas)}
    return {"description": "The answer.", "content": content}


def _event(operation: Operation, schemas: Schemas) -> Schema:
    events = [*(schemas.references[name] for name in operation.events), _error_reference(operation, schemas)]
    data: Schema = {"contentMediaType": "application/json", "contentSchema": {"anyOf": events}}
    if operation.done:
        data = {"anyOf": [data, {"const": operation.done}]}
    return {
        "type": "object",
        "description": 'An event of a stream, with `"stream": true`.',
        "properties": {"event": {"type": "string"}, "data": {"type": "string", **data}},
        "required": ["event", "data"] if operation.named_events else ["data"],
    }


def _errors(route: Route, operation: Operation, schemas: Schemas, responses: dict[str, Any]) -> dict[str, Any]:
    """Refer to one component for each status. Components are shared by operations with the same errors."""
    by_status: dict[int, list[type[ApiError]]] = {}
    for error in dict.fromkeys((*_common(route), *operation.errors)):
        by_status.setdefault(error.status, []).append(error)
    references: dict[str, Any] = {}
    for status, classes in sorted(by_status.items()):
        name = "Or".join(error.__name__ for error in classes)
        name += "" if operation.error is None else f"As{operation.error.rpartition(':')[2]}"
        responses.setdefault(name, _error(status, classes, _error_reference(operation, schemas)))
        references[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return references


def _common(route: Route) -> Iterator[type[ApiError]]:
    """Yield the errors that the head of a request can cause on any route with this access and method."""
    yield from (errors.ApiError, errors.InvalidRequest, errors.Forbidden)
    if route.access != "open" or route.path == "/health":
        yield errors.Unauthorized
    if route.method == "POST":
        yield from (errors.TooLarge, errors.UnsupportedMediaType)


def _error(status: int, classes: list[type[ApiError]], schema: Schema) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": "\n".join(f"`{error.code or error.type}`: {_first_line(error)}" for error in classes),
        "content": {"application/json": {"schema": schema}},
    }
    headers: Mapping[int, tuple[str, str]] = {
        HTTPStatus.UNAUTHORIZED: ("www-authenticate", "string"),
        HTTPStatus.TOO_MANY_REQUESTS: ("retry-after", "integer"),
        HTTPStatus.SERVICE_UNAVAILABLE: ("retry-after", "integer"),
    }
    if status in headers:
        name, kind = headers[HTTPStatus(status)]
        described["headers"] = {name: {"schema": {"type": kind}}}
    return described


def _error_reference(operation: Operation, schemas: Schemas) -> Schema:
    return {"$ref": _REF.format(name="Error")} if operation.error is None else schemas.references[operation.error]


def _first_line(error: type[ApiError]) -> str:
    return (error.__doc__ or error.__name__).strip().splitlines()[0]
