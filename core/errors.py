"""The errors that clients see.

    ApiError                        500 server_error             (generic message; the cause is logged)
    ├── InvalidRequest              400 invalid_request_error
    │   ├── ContextOverflow         400 context_length_exceeded
    │   ├── TooLarge                413 request_too_large
    │   ├── UnsupportedMediaType    415 unsupported_media_type
    │   ├── NotFound                404 not_found
    │   │   └── ModelNotFound       404 model_not_found
    │   ├── MethodNotAllowed        405 method_not_allowed
    │   ├── Unauthorized            401 invalid_api_key
    │   └── Forbidden               403 forbidden
    ├── Busy                        429 rate_limit_error         (+ Retry-After)
    ├── ModelUnavailable            503 model_unavailable        (+ Retry-After)
    ├── DeadlineExceeded        504 timeout
    └── NotSupported            501 not_supported

The status, type and code of each class are part of the API. Messages say what was given, what is allowed and what to
do. They are never copied from the exceptions of a library.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ApiError(Exception):
    """An internal error. Its message is logged; the client gets a generic message with the request id."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = "internal_error"
    retry_after: int | None = None  # seconds

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's envelope: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """Anthropic's envelope: `{"type": "error", "error": {type, message}, "request_id"}`."""
        error = {"type": _ANTHROPIC_TYPES.get(self.status, "invalid_request_error"), "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class InvalidRequest(ApiError):
    """The request is invalid and the client can fix it. `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class ContextOverflow(InvalidRequest):
    """The prompt leaves no room for an answer in the context."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, n_ctx: int, remedy: str, *, param: str | None = "messages") -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; the context holds {n_ctx}, including at least one for the answer. "
            f"{remedy}",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.n_ctx = n_ctx


class TooLarge(InvalidRequest):
    """The body is larger than MAX_BODY_BYTES."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body's content type is not application/json."""

    status = 415
    code = "unsupported_media_type"


class NotFound(InvalidRequest):
    """There is nothing at this path."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The model in the request is not served here. There is no fallback to another model."""

    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    """The path does not have this method. `allowed` are the ones that it has."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{method} is not allowed for {path}; use {' or '.join(allowed)}.")
        self.allowed = allowed


class Unauthorized(InvalidRequest):
    """The key is missing or not valid."""

    status = 401
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """The request is not allowed with this key or from this place."""

    status = 403
    code = "forbidden"


class Busy(ApiError):
    """The queue is full, or another limit on concurrent work. The request had no effect and may be sent again."""

    status = 429
    type = "rate_limit_error"
    code = "busy"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelUnavailable(ApiError):
    """No model can answer: it is loading, failed to load, or is not configured."""

    status = 503
    code = "model_unavailable"

    def __init__(self, message: str, *, retry_after: int | None = 5, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class DeadlineExceeded(ApiError):
    """The deadline passed before the first token. A started answer ends with finish_reason "length" instead."""

    status = 504
    code = "timeout"


class NotSupported(ApiError):
    """The served model cannot do this. Another model could."""

    status = 501
    type = "not_supported_error"
    code = "not_supported"
