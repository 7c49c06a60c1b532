"""Write an answer: streamed behind Lambda's prelude, collected for one document, or as a failure.

The application's exceptions go to the log under the request's id. Neither Lambda nor the client sees their text.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import ApiError
from handlers.sse import DONE, frame

if TYPE_CHECKING:
    from adapters.aws_lambda.runtime_api import ResponseStream

RawHeaders = list[tuple[bytes, bytes]]

JSON_HEADERS: RawHeaders = [(b"content-type", b"application/json")]

# The prelude is JSON and eight NULs, as Amazon's runtimes for Node.js and Rust send it.
CONTENT_TYPE = "application/vnd.awslambda.http-integration-response"
SEPARATOR = b"\0" * 8
DEFAULT_CONTENT_TYPE = "application/octet-stream"

# Hop-by-hop headers (RFC 9110 section 7.6.1), and content-length: the platform frames the body itself and renames ours
# to x-amzn-remapped-content-length.
_DROPPED = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_FORBIDDEN = (b"\r", b"\n", b"\0")

# Lambda replaces a type that does not match this with Function.Unknown or Runtime.Unknown.
_TYPE = re.compile(r"(Runtime|Function)\.[A-Z][a-zA-Z]+")
# Characters. Each takes up to six bytes as JSON and a third more as base64; trailers are limited to 8 KiB.
_MAX_MESSAGE = 800


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as Lambda records it. `type` is `Function.Xyz` or `Runtime.Xyz`, `message` our own text."""

    type: str
    message: str

    @classmethod
    def of(cls, error: BaseException, message: str) -> Failure:
        """Return the failure for an exception: its class becomes the type, its text is left out."""
        name = re.sub(r"[^A-Za-z]", "", type(error).__name__)
        kind = f"Function.{name[:1].upper()}{name[1:]}"
        return cls(kind if _TYPE.fullmatch(kind) else "Function.Error", message)

    def body(self) -> bytes:
        """Return the JSON for `/error`, `/init/error` and the trailer."""
        record = {"errorMessage": self.message[:_MAX_MESSAGE], "errorType": self.type, "stackTrace": []}
        return json.dumps(record).encode()

    def trailers(self) -> bytes:
        """Return the trailers of a stream that broke off. Lambda drops a body that is not base64."""
        return (
            f"Lambda-Runtime-Function-Error-Type: {self.type}\r\n"
            f"Lambda-Runtime-Function-Error-Body: {base64.b64encode(self.body()).decode()}\r\n"
        ).encode()


def envelope(error: ApiError) -> bytes:
    """Return OpenAI's error envelope as JSON."""
    return json.dumps(error.body()).encode()


def checked(headers: Iterable[Iterable[bytes]]) -> RawHeaders:
    """Return the headers in lower case, without the hop-by-hop ones. Raises ValueError for CR, LF, NUL or no name."""
    result: RawHeaders = []
    for pair in headers:
        name, value = pair
        name = bytes(name).lower()
        value = bytes(value)
        if any(mark in name or mark in value for mark in _FORBIDDEN) or not name:
            raise ValueError(f"header {name!r} contains a line break or a NUL, or has no name")
        if name not in _DROPPED:
            result.append((name, value))
    return result


def has_body(method: str, status: int) -> bool:
    """Return whether an answer may have a body (RFC 9110 section 6.4.1)."""
    return method != "HEAD" and status >= 200 and status not in (204, 304)


def prelude(status: int, headers: RawHeaders, *, body: bool = True) -> bytes:
    """Return the prelude for `checked` headers. An answer without a body gets no default content type."""
    values, cookies = joined(headers)
    if body:
        values.setdefault("content-type", DEFAULT_CONTENT_TYPE)
    record: dict[str, Any] = {"statusCode": status, "headers": values}
    if cookies:
        record["cookies"] = cookies
    return json.dumps(record, separators=(",", ":")).encode() + SEPARATOR


def joined(headers: RawHeaders) -> tuple[dict[str, str], list[str]]:
    """Return the headers by name, repeated ones joined with commas, and the cookies, which cannot be joined."""
    values: dict[str, str] = {}
    cookies: list[str] = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name == "set-cookie":
            cookies.append(value)
        else:
            values[name] = f"{values[name]}, {value}" if name in values else value
    return values, cookies


class Answer(Protocol):
    """Where the application's messages go. Call `start`, then `body` until `last`; or `abandon` at any time."""

    @property
    def begun(self) -> bool:
        """Whether bytes have left the process. The status cannot change after that."""

    @property
    def broken(self) -> bool:
        """Whether Lambda has stopped reading."""

    async def start(self, status: int, headers: RawHeaders) -> None: ...

    async def body(self, data: bytes, *, last: bool) -> None: ...

    def withdraw(self) -> None:
        """Forget a start of which no byte has left. Another start follows."""

    async def abandon(self, failure: Failure, error: ApiError) -> None:
        """End a begun answer that cannot be completed."""


class StreamedAnswer:
    """Send each body message as one chunk, at once.

    The prelude is sent with the first body chunk if the application sends both without awaiting, else on its own.
    """

    def __init__(self, stream: ResponseStream, method: str) -> None:
        self._stream = stream
        self._method = method
        self._prelude: bytes | None = None
        self._with_body = True
        self._is_events = False
        self._empty = True

    @property
    def begun(self) -> bool:
        return self._stream.begun

    @property
    def broken(self) -> bool:
        return self._stream.broken

    async def start(self, status: int, headers: RawHeaders) -> None:
        await self._stream.open()
        self._with_body = has_body(self._method, status)
        self._is_events = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        self._prelude = prelude(status, headers, body=self._with_body)
        asyncio.get_running_loop().call_soon(self._flush)

    async def body(self, data: bytes, *, last: bool) -> None:
        if not self._with_body:
            data = b""
        self._empty = self._empty and not data
        if last and self._empty and self._with_body:
            # Function URLs have held empty streamed answers open until the timeout (nodejs RIC#95, LWA#499).
            data = b"\n"
        opening, self._prelude = self._prelude, None
        if opening is not None:
            data = opening + data
        if data or last:
            await self._stream.write(data, last=last)

    async def abandon(self, failure: Failure, error: ApiError) -> None:
        # A function URL's client sees no trailers, so an event stream also carries the error as its last event.
        # Written without waiting: the reason may be a client that does not read.
        if self._is_events:
            self._stream.write_now(frame(error.body()) + DONE)
        await self._stream.end(failure)

    def withdraw(self) -> None:
        self._prelude = None

    def _flush(self) -> None:
        opening, self._prelude = self._prelude, None
        if opening is not None:
            self._stream.write_now(opening)


class BufferedAnswer:
    """Collect everything until the application is done. No byte leaves early."""

    begun = False
    broken = False

    def __init__(self) -> None:
        self.status = 0
        self.headers: RawHeaders = []
        self.content = bytearray()

    async def start(self, status: int, headers: RawHeaders) -> None:
        self.status, self.headers = status, headers
        self.content.clear()

    async def body(self, data: bytes, *, last: bool) -> None:
        self.content += data

    async def abandon(self, failure: Failure, error: ApiError) -> None:
        raise AssertionError("a buffered answer is replaced, never abandoned")

    def withdraw(self) -> None:
        self.headers = []
        self.content.clear()
