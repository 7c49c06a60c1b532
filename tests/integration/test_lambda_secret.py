"""API keys from Secrets Manager: signed requests, answers and failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from adapters.aws.secrets import read_keys
from core.settings import SettingsError, keys
from tests.http_server import QuietHandler, http_server

ARN = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:slm-AbCdEf"
ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}


@contextmanager
def service(*answers: tuple[int, Any]) -> Iterator[tuple[dict[str, str], list[Any]]]:
    """Run a service with these answers. Yield the environment that refers to it, and its requests."""
    requests: list[Any] = []
    remaining = list(answers)

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            requests.append((self.headers, json.loads(body)))
            status, answer = remaining.pop(0)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with http_server(Handler) as port:
        yield {**ENVIRON, "AWS_ENDPOINT_URL_SECRETS_MANAGER": f"http://127.0.0.1:{port}"}, requests


@pytest.mark.parametrize("text", ["one,two", "one, two\n", "one\ntwo", f"one,sha256:{next(iter(keys('two')))}"])
def test_the_secret_is_a_list_of_keys(text: str) -> None:
    """Keys are separated by commas or white space and may be digests."""
    with service((200, {"SecretString": text})) as (environ, _):
        assert read_keys(ARN, environ) == keys("one,two")


def test_the_request_is_signed() -> None:
    """GetSecretValue is signed for the region of the ARN."""
    with service((200, {"SecretString": "one"})) as (environ, requests):
        read_keys(ARN, environ)

    headers, body = requests[0]
    assert body == {"SecretId": ARN}
    assert headers["x-amz-target"] == "secretsmanager.GetSecretValue"
    assert "/eu-central-1/secretsmanager/aws4_request" in headers["authorization"]
    assert headers["x-amz-security-token"] == "token"


def test_moto_accepts_the_request() -> None:
    """boto3 has created the secret in moto's Secrets Manager."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "secretsmanager",
            region_name="eu-central-1",
            endpoint_url=url,
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="secret",
        )
        arn = client.create_secret(Name="slm", SecretString="generated-key")["ARN"]
        assert read_keys(arn, {**ENVIRON, "AWS_ENDPOINT_URL_SECRETS_MANAGER": url}) == keys("generated-key")
    finally:
        server.stop()


DENIED = {"__type": "com.amazonaws#AccessDeniedException", "Message": "User arn:aws:x is not authorized"}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(400, DENIED)], "returned 400 AccessDeniedException"),
        ([(500, b"oops"), (500, b"oops")], "no answer"),
        ([(503, {}), (503, {})], "returned 503"),
        ([(200, {"SecretBinary": "AAAA"})], "returned 200 without a code"),
        ([(200, {"SecretString": ""})], "must be a list of keys"),
        ([(200, {"SecretString": '{"key": "hunter2"}'})], "must be a list of keys"),
        ([(200, {"SecretString": "sha256:hunter2"})], "64 hexadecimal digits"),
    ],
    ids=["denied", "broken", "down", "binary", "empty", "json", "digest"],
)
def test_an_unusable_secret_stops_the_start(answers: list[Any], words: str) -> None:
    """The error has the code of Secrets Manager, but neither the secret nor the message of AWS."""
    with service(*answers) as (environ, requests), pytest.raises(SettingsError, match=words) as raised:
        read_keys(ARN, environ)

    assert len(requests) == len(answers)
    assert "hunter2" not in str(raised.value)
    assert "arn:aws:x" not in str(raised.value)


def test_one_failure_is_retried() -> None:
    """The first answer is throttled."""
    with service((400, {"__type": "ThrottlingException"}), (200, {"SecretString": "one"})) as (environ, _):
        assert read_keys(ARN, environ) == keys("one")


def test_a_secret_needs_an_arn() -> None:
    """A name does not have the region."""
    with pytest.raises(SettingsError, match="must be the ARN"):
        read_keys("slm", ENVIRON)
