"""Sign requests of the stock OpenAI client with IAM, for a function URL with AuthType AWS_IAM.

    from infra.openai_iam import client

    client = client("https://<id>.lambda-url.<region>.on.aws/v1")

This returns an `openai.OpenAI`. For AsyncOpenAI or further options pass `SigV4` to the client as httpx's `auth`:

    AsyncOpenAI(base_url=URL, api_key="unused", http_client=DefaultAsyncHttpxClient(auth=SigV4()))

`SigV4` is a callable, which httpx and httpx2 (used by the client since 2026) both accept. The signature replaces the
Bearer header. If the server also requires an API key, pass it to `SigV4` as `api_key`.
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
    """Return an OpenAI client for `base_url`, which ends in /v1. `api_key` is for a server that also requires a key."""
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(base_url=base_url, api_key="unused", http_client=DefaultHttpxClient(auth=SigV4(api_key=api_key)))


class SigV4:
    """Sign each request. `region` defaults to the function URL's, `credentials` to those that the AWS CLI finds."""

    def __init__(
        self, region: str | None = None, *, api_key: str | None = None, credentials: CredentialChain | None = None
    ) -> None:
        self._region = region
        self._api_key = api_key
        self._credentials = credentials or CredentialChain()

    def __call__(self, request: Request) -> Request:
        """Sign an httpx request whose body is in memory, such as the OpenAI client's JSON bodies.

        Raises ValueError if no region is set and the URL contains none, and ModelUnavailable without credentials.
        """
        httpx_request: Any = request
        region = self._region or _region(httpx_request.url.host)
        headers = {name: httpx_request.headers[name] for name in ("content-type",) if name in httpx_request.headers}
        if self._api_key is not None:
            headers["x-api-key"] = self._api_key
        digest = hashlib.sha256(httpx_request.content).hexdigest()
        credentials = self._credentials.get()
        signed = sign(httpx_request.method, str(httpx_request.url), headers, digest, credentials, region, "lambda")
        for name, value in signed.items():
            httpx_request.headers[name] = value
        return request


def _region(host: str) -> str:
    match = _HOST.search(host)
    if match is None:
        raise ValueError(f"{host!r} is not a function URL. Pass the region, for example SigV4('eu-central-1').")
    return match[1]
