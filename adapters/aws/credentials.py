"""Find AWS credentials: in the environment, at the container's endpoint, or through botocore.

Lambda sets the environment. With SnapStart, and on ECS and EKS, credentials come from the container endpoint and are
renewed before they expire. Profiles, SSO and the instance metadata service are left to botocore and come last, because
its import is slow.
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
# Plain HTTP exposes the secret to the network. Only these hosts may use it, as in botocore.
_PLAIN_HOSTS = {"127.0.0.1", "localhost", "::1", "169.254.170.2", "169.254.170.23", "fd00:ec2::23"}
_EARLY = 300  # seconds; credentials are renewed this long before they expire


class CredentialChain:
    """Find credentials and cache them until shortly before they expire. Thread-safe."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._lock = threading.Lock()
        self._cached: Credentials | None = None

    def get(self, *, stale: Credentials | None = None) -> Credentials:
        """Return credentials for one request. Pass those that a service rejected as expired as `stale`.

        Raises ModelUnavailable if there are none.
        """
        with self._lock:
            cached = self._cached
            if cached is None or cached == stale or (cached.expires and cached.expires - _EARLY < time.time()):
                cached = self._cached = self._find()
            return cached

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
            raise ModelUnavailable("The container's credential endpoint returned no AWS credentials.") from error
        finally:
            connection.close()


def _botocore() -> Credentials:
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        credentials = get_session().get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
    except BotoCoreError as error:
        raise ModelUnavailable("AWS credentials could not be read. Check the AWS profile.") from error
    if frozen is None or not frozen.access_key or not frozen.secret_key:
        raise ModelUnavailable(
            "No AWS credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or a role."
        )
    # botocore renews its credentials itself. Fetching them every 15 minutes is enough to follow.
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token, time.time() + 900 + _EARLY)
