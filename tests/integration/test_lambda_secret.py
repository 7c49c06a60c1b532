"""Keys out of Secrets Manager: a server that checks the request as AWS would, and one that fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from adapters.aws.secrets import read_keys
from core.settings import SettingsError, keys

ARN = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:slm-AbCdEf"
ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}


@contextmanager
def service(*answers: tuple[int, Any]) -> Iterator[tuple[dict[str, str], list[Any]]]:
    """The environment that leads to a service which gives these answers in turn, and the requests it had."""
    seen: list[Any] = []
    waiting = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers, json.loads(body)))
            status, answer = waiting.pop(0)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield {**ENVIRON, "AWS_ENDPOINT_URL_SECRETS_MANAGER": url}, seen
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("text", ["one,two", "one, two\n", "one\ntwo", f"one,sha256:{next(iter(keys('two')))}"])
def test_keys_in_the_secret(text: str) -> None:
    """Separated by commas or white space, plain or as digests."""
    with service((200, {"SecretString": text})) as (environ, _):
        assert read_keys(ARN, environ) == keys("one,two")


def test_the_request_is_signed() -> None:
    """GetSecretValue, signed for Secrets Manager in the region of the ARN."""
    with service((200, {"SecretString": "one"})) as (environ, seen):
        read_keys(ARN, environ)

    headers, body = seen[0]
    assert body == {"SecretId": ARN}
    assert headers["x-amz-target"] == "secretsmanager.GetSecretValue"
    assert "/eu-central-1/secretsmanager/aws4_request" in headers["authorization"]
    assert headers["x-amz-security-token"] == "token"


def test_moto_accepts_it() -> None:
    """The same against moto's Secrets Manager, where boto3 has made the secret."""
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
def test_a_secret_that_cannot_be_used(answers: list[Any], words: str) -> None:
    """The start stops with what Secrets Manager said, and neither the secret nor AWS's own sentence."""
    with service(*answers) as (environ, seen), pytest.raises(SettingsError, match=words) as raised:
        read_keys(ARN, environ)

    assert len(seen) == len(answers)
    assert "hunter2" not in str(raised.value)
    assert "arn:aws:x" not in str(raised.value)


def test_one_failure_is_forgiven() -> None:
    """A throttled or broken first answer is asked for again."""
    with service((400, {"__type": "ThrottlingException"}), (200, {"SecretString": "one"})) as (environ, _):
        assert read_keys(ARN, environ) == keys("one")


def test_only_arns_of_secrets() -> None:
    """A name is no ARN: the region would be a guess."""
    with pytest.raises(SettingsError, match="must be the ARN"):
        read_keys("slm", ENVIRON)
