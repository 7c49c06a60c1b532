"""GET /docs: `/openapi.json` as one HTML page. It loads nothing and runs no script."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections.abc import Iterator
from hashlib import sha256
from html import escape
from typing import Any

from core.errors import ApiError, Forbidden, InvalidRequest, TooLarge, Unauthorized, UnsupportedMediaType
from core.service import Service
from handlers.http import Request, Response
from handlers.openapi import document

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
"""

# The hash allows this style and no other; everything else is forbidden.
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_HEADERS = (
    ("content-type", "text/html; charset=utf-8"),
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
)

# Responses that most routes share. They are shown once.
_COMMON = {
    error.__name__: error.status
    for error in (InvalidRequest, Unauthorized, Forbidden, TooLarge, UnsupportedMediaType, ApiError)
}

_ORDER = ("get", "post", "delete")


async def get_docs(service: Service, request: Request) -> Response:
    """Return the page. It is open to all, like the document."""
    return Response(200, _HEADERS, await asyncio.to_thread(page))


@functools.cache
def page() -> bytes:
    api = document()
    operations = [
        (method, path, item[method]) for path, item in api["paths"].items() for method in _ORDER if method in item
    ]
    rows = [
        [
            f'<a href="#{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code></a>',
            _text(operation["summary"]),
            _text(operation["description"]),
        ]
        for method, path, operation in operations
    ]
    title = f"{escape(api['info']['title'])} {escape(api['info']['version'])}"
    body = "".join(
        (
            f"<h1>{title}</h1>",
            f"<p>{_text(api['info']['description'])}</p>",
            '<p>The same as data: <a href="openapi.json">openapi.json</a>. The command lines need two variables:</p>',
            "<pre>URL=http://127.0.0.1:8000\nKEY=…</pre>",
            _table(("Route", "What it does", "Access"), rows),
            _common_errors(api),
            *(_section(api, method, path, operation) for method, path, operation in operations),
            "<h2>Types</h2>",
            *(_component(name, schema) for name, schema in sorted(api["components"]["schemas"].items())),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    ).encode()


def _section(api: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<h2 id="{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code></h2>',
        f"<p>{_text(operation['summary'])} {_text(operation['description'])}</p>",
        f"<pre>{escape(_curl(method, path, operation))}</pre>",
    ]
    # 1) What goes in.
    if parameters := operation.get("parameters"):
        rows = [
            [
                f"<code>{escape(parameter['name'])}</code>",
                f"{parameter['in']}, {_type(parameter['schema'])}",
                _text(parameter["description"]),
            ]
            for parameter in parameters
        ]
        parts.append(_table(("Parameter", "Type", "Meaning"), rows))
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        parts.append(f"<h3>Request: {_type(schema)}</h3>")
        if (reference := schema.get("$ref")) is not None:
            parts.append(_fields(api["components"]["schemas"][reference.rpartition("/")[2]]))
    # 2) What comes out.
    rows = [
        [
            f"<code>200</code> {escape(media_type)}",
            _type(content["schema"].get("properties", {}).get("data", content["schema"])),
        ]
        for media_type, content in operation["responses"]["200"]["content"].items()
    ]
    for status, reference in operation["responses"].items():
        name = reference.get("$ref", "").rpartition("/")[2]
        if name and name not in _COMMON:
            rows.append([f"<code>{status}</code>", _error(api, name)])
    parts.append(f"<h3>Answer</h3>{_table(('Status', 'Body'), rows)}")
    return "".join(parts)


def _common_errors(api: dict[str, Any]) -> str:
    rows = [[f"<code>{status}</code>", _error(api, name)] for name, status in _COMMON.items()]
    return f"<h2>Errors of every route</h2>{_table(('Status', 'Code'), rows)}"


def _error(api: dict[str, Any], name: str) -> str:
    return "<br>".join(_text(line) for line in api["components"]["responses"][name]["description"].splitlines())


def _body(media_type: str, schema: dict[str, Any]) -> str:
    return f"events of {_type(schema['properties']['data'])}" if media_type == "text/event-stream" else _type(schema)


def _curl(method: str, path: str, operation: dict[str, Any]) -> str:
    """Return a command line for a shell with the variables URL and KEY."""
    words = [f'curl "$URL{path}"']
    if operation["security"]:
        words.append('-H "Authorization: Bearer $KEY"')
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"].get("example", {})
        body = json.dumps(example, ensure_ascii=False).replace("'", "'\\''")
        words += ["-H 'Content-Type: application/json'", f"-d '{body}'"]
    elif method != "get":
        words.insert(1, f"-X {method.upper()}")
    return " \\\n  ".join(words)


def _component(name: str, schema: dict[str, Any]) -> str:
    return f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>{_fields(schema)}'


def _fields(schema: dict[str, Any]) -> str:
    if "properties" not in schema:
        return f"<p>{_type(schema)}</p>"
    required = schema.get("required", ())
    rows = []
    unsupported = []
    for name, field in schema["properties"].items():
        if field.get("description") == "Not supported.":
            unsupported.append(f"<code>{escape(name)}</code>")
            continue
        default = (
            f"<code>{_json(field['default'])}</code>" if "default" in field else "required" if name in required else ""
        )
        rows.append([f"<code>{escape(name)}</code>", _type(field), default, _text(field.get("description", ""))])
    table = _table(("Field", "Type", "Default", "Meaning"), rows) if rows else ""
    if unsupported:
        table += f"<p>Not supported; a value that would change the answer is a 400: {', '.join(unsupported)}.</p>"
    return table


def _type(schema: dict[str, Any]) -> str:
    """Return a schema in words: "number, 0 to 2, or null"."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "contentSchema" in schema:
        return _type(schema["contentSchema"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(option) for option in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"<code>{_json(value)}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{_json(schema['const'])}</code>"
    kinds = schema.get("type", "any JSON value")
    kind = kinds if isinstance(kinds, str) else " or ".join(kinds)
    if kind == "array":
        inner = f" of {_type(schema['items'])}" if isinstance(schema.get("items"), dict) else ""
        return f"array{inner}{_bounds(schema, 'minItems', 'maxItems', ' items')}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    if kind == "string":
        return f"string{_bounds(schema, 'minLength', 'maxLength', ' characters')}"
    return f"{kind}{_bounds(schema, 'minimum', 'maximum', '')}"


def _bounds(schema: dict[str, Any], low: str, high: str, unit: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if least is not None and most is not None:
        return f" ({least} to {most}{unit})"
    if least is not None:
        return f" (at least {least}{unit})"
    return "" if most is None else f" (at most {most}{unit})"


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    """Return text as HTML, with `code` between backticks."""
    return "".join(_spans(text))


def _spans(text: str) -> Iterator[str]:
    for index, part in enumerate(text.split("`")):
        yield f"<code>{escape(part)}</code>" if index % 2 else escape(part)


def _json(value: Any) -> str:
    return escape(json.dumps(value, ensure_ascii=False))
