"""Direct invokes of the real application: plain JSON in and out, errors as function errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from adapters.serving.asgi import create_app
from core.errors import ModelUnavailable
from core.settings import keys
from infra.emulator.exchange import Exchange
from tests.fakes import ScriptedEngine, fake_service
from tests.lambda_runtime import runtime

MESSAGES = [{"role": "user", "content": "Hello"}]


def invoke(event: dict[str, Any], *, engine: ScriptedEngine | None = None, **settings: Any) -> Exchange:
    async def go() -> Exchange:
        app = create_app(fake_service(engine, api_keys=keys("secret"), **settings).service)
        async with runtime(app) as bench:
            exchange = await bench.invoke(event)
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


def result(exchange: Exchange) -> Any:
    assert exchange.error is None
    return json.loads(exchange.body)


def test_reading_operations_need_no_body() -> None:
    """They need no key either."""
    assert result(invoke({"operation": "health"}))["status"] == "ready"
    assert result(invoke({"operation": "models"}))["active"]["name"] == "fake-1b"


def test_chat_returns_the_completion() -> None:
    """The event's other fields are the request body. The answer is OpenAI's object without an HTTP envelope."""
    completion = result(invoke({"operation": "chat", "messages": MESSAGES, "max_tokens": 2}))

    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"] == "Hello there, "


def test_a_direct_invoke_is_a_user() -> None:
    """IAM has checked the caller, so no key is needed. Callers of an IAM-guarded URL may invoke directly, too, so
    a direct invoke is not an administrator."""
    for operation in ("load", "reload"):
        exchange = invoke({"operation": operation, "model_path": "nowhere.gguf"})
        assert exchange.error is not None
        assert exchange.error["errorType"] == "Function.Forbidden"
        assert "DIRECT_ADMIN=true" in exchange.error["errorMessage"]


def test_direct_admin_makes_it_an_administrator() -> None:
    """DIRECT_ADMIN is for deployments whose direct callers are operators."""
    exchange = invoke({"operation": "reload", "model_path": "nowhere.gguf"}, direct_admin=True)

    assert exchange.error is not None
    assert exchange.error["errorType"] == "Function.ModelNotFound"


def test_errors_are_typed_for_state_machines() -> None:
    """A refused operation is a function error with the error class as type and the client's message."""
    exchange = invoke({"operation": "chat", "messages": []})
    assert exchange.error is not None
    assert exchange.error["errorType"].startswith("Function.")
    assert "messages" in exchange.error["errorMessage"]

    exchange = invoke({"operation": "chat", "messages": MESSAGES}, engine=ScriptedEngine(error=ModelUnavailable("x y")))
    assert exchange.error == {"errorType": "Function.ModelUnavailable", "errorMessage": "x y", "stackTrace": []}


def test_a_stream_is_refused() -> None:
    """A direct invoke returns a single JSON document."""
    exchange = invoke({"operation": "chat", "messages": MESSAGES, "stream": True})

    assert exchange.error is not None
    assert "stream" in exchange.error["errorMessage"]


def test_fields_of_reading_operations_become_the_query() -> None:
    """They are GET requests."""
    from adapters.aws_lambda import operations as direct

    scope, body = direct.to_request({"operation": "health", "wait": 1})

    assert (scope["method"], scope["query_string"], body) == ("GET", b"wait=1", b"")


def test_iam_auth_requires_the_identity_in_the_event() -> None:
    """With a URL of AuthType NONE or behind a load balancer, IAM_AUTH thus refuses all requests."""

    async def go() -> list[int | None]:
        app = create_app(fake_service(iam_auth=True).service)
        async with runtime(app) as bench:
            exchanges = [
                await bench.get("/v1/models"),
                await bench.get("/v1/models", headers=[("x-amzn-iam", "arn"), ("authorization", "AWS4-HMAC-SHA256 x")]),
                await bench.get("/v1/models", caller="arn:aws:iam::123456789012:user/ann"),
                await bench.get("/health"),
            ]
            await bench.still_serves()
            return [exchange.status for exchange in exchanges]

    assert asyncio.run(go()) == [403, 403, 200, 200]
