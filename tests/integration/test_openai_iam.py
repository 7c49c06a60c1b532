"""The stock OpenAI client with our SigV4 `auth`. botocore computes the expected signatures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from adapters.aws.credentials import CredentialChain
from infra.openai_iam import SigV4
from tests.http_server import QuietHandler, http_server

ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret/key", "AWS_SESSION_TOKEN": "token=="}
COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hällo"}}],
}


def expected(request: BaseHTTPRequestHandler, body: bytes) -> str:
    """Return botocore's signature of this request, as in the Authorization header."""
    names = request.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    headers = {name: request.headers[name] for name in names}
    url = f"http://{request.headers['host']}{request.path}"
    resigned = AWSRequest(method=request.command, url=url, data=body, headers=headers)
    resigned.context["timestamp"] = request.headers["x-amz-date"]
    signer = SigV4Auth(Credentials(*ENVIRON.values()), "lambda", "eu-central-1")
    text = signer.string_to_sign(resigned, signer.canonical_request(resigned))
    return f"Signature={signer.signature(text, resigned)}"


class Guard(QuietHandler):
    """A function URL with AuthType AWS_IAM: it answers 403 unless the signature is right."""

    received_headers: list[dict[str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.answer(body)

    def do_GET(self) -> None:
        self.answer(b"")

    def answer(self, body: bytes) -> None:
        self.received_headers.append({name.lower(): value for name, value in self.headers.items()})
        good = self.headers["authorization"].endswith(expected(self, body))
        content = json.dumps(COMPLETION if self.command == "POST" else {"object": "list", "data": []}).encode()
        if body and json.loads(body).get("stream"):
            chunk = {**COMPLETION, "object": "chat.completion.chunk"}
            chunk["choices"] = [{"index": 0, "finish_reason": None, "delta": {"content": "Hällo"}}]
            content = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
        self.send_response(200 if good else 403)
        self.send_header("content-type", "text/event-stream" if content.startswith(b"data") else "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def guard() -> Iterator[tuple[str, list[dict[str, str]]]]:
    Guard.received_headers = []
    with http_server(Guard) as port:
        yield f"http://127.0.0.1:{port}/v1", Guard.received_headers


MESSAGES: Any = [{"role": "user", "content": "Grüße, 東京"}]


def auth(**options: Any) -> SigV4:
    return SigV4("eu-central-1", credentials=CredentialChain(ENVIRON), **options)


def test_the_sync_client_is_signed(guard: tuple[str, list[dict[str, str]]]) -> None:
    """This covers complete and streamed answers and a GET with a query. The Bearer placeholder is not sent."""
    from openai import DefaultHttpxClient, OpenAI

    url, received_headers = guard
    with OpenAI(base_url=url, api_key="unused", max_retries=0, http_client=DefaultHttpxClient(auth=auth())) as client:
        whole = client.chat.completions.create(model="m", messages=MESSAGES)
        with client.chat.completions.create(model="m", messages=MESSAGES, stream=True) as stream:
            texts = [chunk.choices[0].delta.content for chunk in stream]
        client.models.list(extra_query={"b": "x y/z", "a": "é"})

    assert whole.choices[0].message.content == "Hällo"
    assert texts == ["Hällo"]
    assert all("unused" not in str(headers) for headers in received_headers)
    assert {headers["x-amz-security-token"] for headers in received_headers} == {"token=="}


def test_the_async_client_is_signed(guard: tuple[str, list[dict[str, str]]]) -> None:
    """The service's own key is sent in x-api-key, which is signed."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    url, received_headers = guard

    async def go() -> Any:
        http_client = DefaultAsyncHttpxClient(auth=auth(api_key="app-key"))
        async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http_client) as client:
            whole = await client.chat.completions.create(model="m", messages=MESSAGES)
            async with await client.chat.completions.create(model="m", messages=MESSAGES, stream=True) as stream:
                return whole, [chunk.choices[0].delta.content async for chunk in stream]

    whole, texts = asyncio.run(go())

    assert whole.choices[0].message.content == "Hällo"
    assert texts == ["Hällo"]
    assert all(headers["x-api-key"] == "app-key" for headers in received_headers)
    assert "x-api-key" in received_headers[0]["authorization"]


def test_a_wrong_secret_is_refused(guard: tuple[str, list[dict[str, str]]]) -> None:
    """The server of these tests does check signatures."""
    from openai import DefaultHttpxClient, OpenAI, PermissionDeniedError

    wrong = SigV4("eu-central-1", credentials=CredentialChain({**ENVIRON, "AWS_SECRET_ACCESS_KEY": "other"}))
    with (
        OpenAI(
            base_url=guard[0], api_key="unused", max_retries=0, http_client=DefaultHttpxClient(auth=wrong)
        ) as client,
        pytest.raises(PermissionDeniedError),
    ):
        client.chat.completions.create(model="m", messages=MESSAGES)


def test_the_region_comes_from_the_url() -> None:
    """A function URL contains its region. Other addresses need the argument."""
    from openai import DefaultHttpxClient

    with DefaultHttpxClient() as client:
        signer = SigV4(credentials=CredentialChain(ENVIRON))
        signed = signer(client.build_request("GET", "https://abc.lambda-url.ap-southeast-2.on.aws/v1/models"))
        assert "/ap-southeast-2/lambda/aws4_request" in signed.headers["authorization"]
        with pytest.raises(ValueError, match="Pass the region"):
            signer(client.build_request("GET", "https://example.com/"))
