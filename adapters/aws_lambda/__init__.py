"""AWS Lambda. `python -m adapters.aws_lambda` runs our own runtime, which streams. `adapters.aws_lambda.handler` is the
handler for awslambdaric, which buffers; it is built at its first access."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "handler":
        from adapters.aws_lambda.mangum_handler import make_handler

        globals()["handler"] = handler = make_handler()
        return handler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
