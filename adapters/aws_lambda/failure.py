"""Failure: what an invocation that went wrong is told to Lambda as, and to the client.

Neither ever holds a foreign exception's text: that goes to the log, under the request's id.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

from core.errors import ApiError

# Lambda keeps a type only if it looks like this; any other becomes Function.Unknown or Runtime.Unknown.
_TYPE = re.compile(r"(Runtime|Function)\.[A-Z][a-zA-Z]+")
_MAX_MESSAGE = 800  # characters, six bytes each as JSON and a third more as base64; trailers may have 8 KiB


@dataclass(frozen=True, slots=True)
class Failure:
    """`type` as Lambda wants it, `Function.Xyz` or `Runtime.Xyz`; `message` in our words."""

    type: str
    message: str

    @classmethod
    def of(cls, error: BaseException, message: str) -> Failure:
        """The failure that `error` is; `message` is ours."""
        name = re.sub(r"[^A-Za-z]", "", type(error).__name__)
        kind = f"Function.{name[:1].upper()}{name[1:]}"
        return cls(kind if _TYPE.fullmatch(kind) else "Function.Error", message)

    def body(self) -> bytes:
        """The JSON of `/error`, `/init/error` and the trailer."""
        record = {"errorMessage": self.message[:_MAX_MESSAGE], "errorType": self.type, "stackTrace": []}
        return json.dumps(record).encode()

    def trailers(self) -> bytes:
        """What follows the last chunk of a stream that broke off. The body is base64, else Lambda drops it."""
        return (
            f"Lambda-Runtime-Function-Error-Type: {self.type}\r\n"
            f"Lambda-Runtime-Function-Error-Body: {base64.b64encode(self.body()).decode()}\r\n"
        ).encode()


def envelope(message: str, code: str, *, status: int = 500) -> bytes:
    """OpenAI's error envelope as JSON."""
    kind = "invalid_request_error" if status < 500 else ApiError.type
    record: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return json.dumps(record).encode()


def event(body: bytes) -> bytes:
    """An envelope as the last events of an SSE stream."""
    return b"data: " + body + b"\n\ndata: [DONE]\n\n"
