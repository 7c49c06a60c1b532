"""IAM for the stock OpenAI client: sign each request for a function URL with AuthType AWS_IAM.

    from infra.openai_iam import client

    client = client("https://<id>.lambda-url.<region>.on.aws/v1")

returns an `openai.OpenAI`. For AsyncOpenAI, and for options of the client, use `SigV4` as httpx's `auth`:

    AsyncOpenAI(base_url=URL, api_key="unused", http_client=DefaultAsyncHttpxClient(auth=SigV4()))

`SigV4` is a callable, which httpx and httpx2 (the client uses it since 2026) both take. The signature replaces the
Bearer header; if the service also wants a key of its own, pass it as `api_key` to SigV4.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.aws.credentials import CredentialChain
from adapters.aws.sigv4 import sign

if TYPE_CHECKING:
    from openai import OpenAI

_HOST = re.compile(r"\.lambda-url\.([a-z0-9-]+)\.on\.aws$")

Request = TypeVar("Request")


def client(base_url: str, *, api_key: str | None = None) -> OpenAI:
    """Return the OpenAI client for `base_url`, which ends in /v1. `api_key` is for a service that wants one, too."""
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(base_url=base_url, api_key="unused", http_client=DefaultHttpxClient(auth=SigV4(api_key=api_key)))


class SigV4:
    """`region` is read off the function URL unless given; `credentials` are found as the AWS CLI finds them."""

    def __init__(
        self, region: str | None = None, *, api_key: str | None = None, credentials: CredentialChain | None = None
    ) -> None:
        self._region = region
        self._api_key = api_key
        self._credentials = credentials or CredentialChain()

    def __call__(self, request: Request) -> Request:
        """Sign an httpx request whose body is in memory, as the OpenAI client's JSON bodies are.

        Raises ValueError if the region is neither given nor in the URL, ModelUnavailable without credentials.
        """
        sent: Any = request
        region = self._region or _region(sent.url.host)
        headers = {name: sent.headers[name] for name in ("content-type",) if name in sent.headers}
        if self._api_key is not None:
            headers["x-api-key"] = self._api_key
        digest = hashlib.sha256(sent.content).hexdigest()
        credentials = self._credentials.get()
        signed = sign(sent.method, str(sent.url), headers, digest, credentials, region, "lambda")
        for name, value in signed.items():
            sent.headers[name] = value
        return request


def _region(host: str) -> str:
    match = _HOST.search(host)
    if match is None:
        raise ValueError(f"{host!r} is no function URL; give the region: SigV4('eu-central-1')")
    return match[1]
