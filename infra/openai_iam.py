"""IAM for the stock OpenAI client: signs each request for a function URL with AuthType AWS_IAM.

    from openai import DefaultHttpxClient, OpenAI
    from infra.openai_iam import SigV4

    client = OpenAI(base_url=URL + "/v1", api_key="unused", http_client=DefaultHttpxClient(auth=SigV4()))

and the same with AsyncOpenAI and DefaultAsyncHttpxClient. It is the callable that httpx (and httpx2, which the
client uses since 2026) takes for `auth`, so that it works with either. The signature takes the place of the Bearer
header; if the service wants a key of its own, too, give it as `api_key` here.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

from adapters.credentials import CredentialChain
from adapters.sigv4 import sign

_HOST = re.compile(r"\.lambda-url\.([a-z0-9-]+)\.on\.aws$")

Request = TypeVar("Request")


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
