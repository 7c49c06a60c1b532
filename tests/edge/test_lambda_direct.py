"""Direct invokes over the real application: plain JSON in and out, errors as function errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from adapters.asgi import create_app
from core.errors import ModelUnavailable
from core.settings import keys
from infra.runtime_api_exchange import Exchange
from tests.fakes import ScriptedEngine, fake_service
from tests.lambda_runtime import runtime

MESSAGES = [{"role": "user", "content": "Hello"}]


def invoke(event: dict[str, Any], *, engine: ScriptedEngine | None = None) -> Exchange:
    async def go() -> Exchange:
        app = create_app(fake_service(engine, api_keys=keys("secret")).service)
        async with runtime(app) as bench:
            exchange = await bench.invoke(event)
            await bench.is_well()
            return exchange

    return asyncio.run(go())


def result(exchange: Exchange) -> Any:
    assert exchange.error is None
    return json.loads(exchange.body)


def test_health_and_models() -> None:
    """The reading operations need no body and no key."""
    assert result(invoke({"operation": "health"}))["status"] == "ready"
    assert result(invoke({"operation": "models"}))["active"]["name"] == "fake-1b"


def test_chat_answers_with_the_completion() -> None:
    """The event's other fields are the request body, the answer is OpenAI's object and no HTTP envelope."""
    completion = result(invoke({"operation": "chat", "messages": MESSAGES, "max_tokens": 2}))

    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"] == "Hello there, "


def test_a_direct_invoke_is_an_administrator() -> None:
    """IAM has let it in: no key is asked for, not even where HTTP needs an admin key."""
    from adapters.aws_lambda import direct

    scope, _ = direct.to_request({"operation": "reload", "model_path": "x"})
    assert scope["path"] == "/reload"

    exchange = invoke({"operation": "reload", "model_path": "nowhere.gguf"})
    assert exchange.error is not None
    assert exchange.error["errorType"] == "Function.ModelNotFound"  # and not Unauthorized


def test_errors_are_typed_for_state_machines() -> None:
    """A refused operation is a function error whose type says what to do and whose message a client would read."""
    exchange = invoke({"operation": "chat", "messages": []})
    assert exchange.error is not None
    assert exchange.error["errorType"].startswith("Function.")
    assert "messages" in exchange.error["errorMessage"]

    exchange = invoke({"operation": "chat", "messages": MESSAGES}, engine=ScriptedEngine(error=ModelUnavailable("x y")))
    assert exchange.error == {"errorType": "Function.ModelUnavailable", "errorMessage": "x y", "stackTrace": []}


def test_a_stream_is_refused() -> None:
    """There is one JSON document to answer with."""
    exchange = invoke({"operation": "chat", "messages": MESSAGES, "stream": True})

    assert exchange.error is not None
    assert "stream" in exchange.error["errorMessage"]


def test_query_parameters_of_reading_operations() -> None:
    """Fields beside a GET operation are its query."""
    from adapters.aws_lambda import direct

    scope, body = direct.to_request({"operation": "health", "wait": 1})

    assert (scope["method"], scope["query_string"], body) == ("GET", b"wait=1", b"")
