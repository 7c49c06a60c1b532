"""Read API keys from Secrets Manager with the standard library. botocore would add a second to each cold start.

The secret is a list of keys separated by commas or white space, each plain or `sha256:<hex>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from adapters.aws.credentials import CredentialChain
from adapters.aws.sigv4 import sign
from core.errors import ModelUnavailable
from core.settings import SettingsError, keys

_ARN = re.compile(r"arn:(aws[a-z-]*):secretsmanager:([a-z0-9-]+):\d{12}:secret:\S+")
_TIMEOUT_S = 3.0
_ATTEMPTS = 2


def read_keys(arn: str, environ: Mapping[str, str], credentials: CredentialChain | None = None) -> frozenset[str]:
    """Return the digests of the keys in the secret. Raises SettingsError, without any text of the secret."""
    match = _ARN.fullmatch(arn)
    if match is None:
        raise SettingsError("API_KEYS_SECRET must be the ARN of a Secrets Manager secret (arn:aws:secretsmanager:...).")
    partition, region = match.groups()
    suffix = "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com"
    endpoint = environ.get("AWS_ENDPOINT_URL_SECRETS_MANAGER") or f"https://secretsmanager.{region}.{suffix}"
    try:
        text = _get(endpoint, arn, region, credentials or CredentialChain(environ))
    except ModelUnavailable as error:
        raise SettingsError(f"API_KEYS_SECRET cannot be read: {error.message}") from None
    try:
        digests = keys(",".join(text.split()))
    except ValueError as error:
        raise SettingsError(f"The secret of API_KEYS_SECRET {error}.") from None
    if not digests or text.lstrip().startswith("{"):
        raise SettingsError("The secret of API_KEYS_SECRET must be a list of keys separated by commas, not JSON.")
    return digests


def _get(endpoint: str, arn: str, region: str, credentials: CredentialChain) -> str:
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    parts = urlsplit(endpoint)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    body = json.dumps({"SecretId": arn}).encode()
    problem = ""
    for _ in range(_ATTEMPTS):
        headers = sign(
            "POST",
            endpoint.rstrip("/") + "/",
            {"content-type": "application/x-amz-json-1.1", "x-amz-target": "secretsmanager.GetSecretValue"},
            hashlib.sha256(body).hexdigest(),
            credentials.get(),
            region,
            "secretsmanager",
        )
        connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", "/", body, headers)
            response = connection.getresponse()
            reply = json.loads(response.read(1 << 20))
            if not isinstance(reply, dict):
                raise ValueError
        except (OSError, HTTPException, ValueError) as error:
            problem = f"no answer from Secrets Manager ({type(error).__name__})"
            continue
        finally:
            connection.close()
        if response.status == 200 and isinstance(reply.get("SecretString"), str):
            return str(reply["SecretString"])
        code = re.sub(r"[^A-Za-z]", "", str(reply.get("__type", "")).rpartition("#")[2])[:60]
        problem = f"Secrets Manager returned {response.status} {code or 'without a code'}"
        if response.status < 500 and code != "ThrottlingException":
            break
    raise SettingsError(f"API_KEYS_SECRET cannot be read: {problem}.")
