"""Where AWS credentials come from: the environment, the container's endpoint, or whatever botocore finds.

Lambda sets the environment; with SnapStart, and on ECS and EKS, it is the container endpoint instead, whose
credentials are renewed before they expire. Profiles, SSO and the instance metadata service are botocore's business
and cost its import, so they come last.
"""

from __future__ import annotations

import calendar
import json
import os
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from adapters.aws.sigv4 import Credentials
from core.errors import ModelUnavailable

ECS_ADDRESS = "http://169.254.170.2"
# Plain HTTP would show the secret to the network: only these hosts, as botocore has it.
_PLAIN_HOSTS = {"127.0.0.1", "localhost", "::1", "169.254.170.2", "169.254.170.23", "fd00:ec2::23"}
_EARLY = 300  # seconds before the end at which credentials are renewed


class CredentialChain:
    """Finds credentials and keeps them until shortly before they expire. Thread-safe."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._lock = threading.Lock()
        self._found: Credentials | None = None

    def get(self, *, stale: Credentials | None = None) -> Credentials:
        """Credentials for one request. Pass those that a service called expired as `stale` to have others.

        Raises ModelUnavailable when there are none.
        """
        with self._lock:
            found = self._found
            if found is None or found == stale or (found.expires and found.expires - _EARLY < time.time()):
                found = self._found = self._find()
            return found

    def _find(self) -> Credentials:
        environ = self._environ
        key, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
        if key and secret:
            return Credentials(key, secret, environ.get("AWS_SESSION_TOKEN") or None)
        if path := environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
            return self._container(ECS_ADDRESS + path)
        if url := environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
            return self._container(url)
        return _botocore()

    def _container(self, url: str) -> Credentials:
        from http.client import HTTPConnection, HTTPException, HTTPSConnection

        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in _PLAIN_HOSTS:
            raise ModelUnavailable("AWS_CONTAINER_CREDENTIALS_FULL_URI must be https, or http on a link-local address.")
        token = self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
        if file := self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            with open(file, encoding="ascii") as stream:  # noqa: PTH123 - pathlib costs an import on the cold path
                token = stream.read().strip()
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=5)
        try:
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Authorization": token} if token else {})
            response = connection.getresponse()
            reply = json.loads(response.read(65536)) if response.status == 200 else {}
            expires = reply.get("Expiration")
            return Credentials(
                reply["AccessKeyId"],
                reply["SecretAccessKey"],
                reply.get("Token") or None,
                calendar.timegm(time.strptime(expires[:19], "%Y-%m-%dT%H:%M:%S")) if expires else None,
            )
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise ModelUnavailable("The container's credential endpoint gave no AWS credentials.") from error
        finally:
            connection.close()


def _botocore() -> Credentials:
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        found = get_session().get_credentials()
        frozen = found.get_frozen_credentials() if found else None
    except BotoCoreError as error:
        raise ModelUnavailable("AWS credentials could not be read; check the AWS profile in use.") from error
    if frozen is None or not frozen.access_key or not frozen.secret_key:
        raise ModelUnavailable(
            "No AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role."
        )
    # botocore renews what it finds by itself; asking it again each quarter of an hour is enough to follow.
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token, time.time() + 900 + _EARLY)
