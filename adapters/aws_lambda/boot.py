"""Boot: from the environment to a Service that is already loading its model.

The load begins first, in a thread, and everything else of a cold start (the web framework's import, the secret's
reading) happens beside it, but not before it has begun: two threads that import share one interpreter lock, and each
takes twice as long.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from core.settings import Settings, SettingsError
from core.timeline import Timeline

if TYPE_CHECKING:
    from core.service import Service


def place_in_tmp(environ: MutableMapping[str, str]) -> None:
    """Lambda's file system is read-only but for /tmp, and its user has no home: defaults that can be written to."""
    home = environ.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        environ["HOME"] = "/tmp"  # noqa: S108 - Lambda's one writable folder, private to the environment
    for name, folder in (("HF_HOME", "/tmp/huggingface"), ("MODELS_DIR", "/tmp/models")):  # noqa: S108 - as above
        if not environ.get(name):
            environ[name] = folder


def read_settings(environ: MutableMapping[str, str]) -> Settings:
    """Settings for Lambda. Raises SettingsError, also when nothing guards the function's URL."""
    settings = Settings.from_env(environ)
    if not (settings.api_keys or settings.api_keys_secret or settings.iam_auth):
        raise SettingsError(
            "API_KEYS or API_KEYS_SECRET must be set: a function URL with AuthType NONE is open to the world. "
            "If IAM guards it (AuthType AWS_IAM), set IAM_AUTH=true."
        )
    return settings


class Boot:
    """Reads the settings (raises SettingsError) and starts loading; `service` waits for what must be there to serve."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.timeline = Timeline()
        place_in_tmp(environ)
        self.settings = read_settings(environ)
        self._environ = environ
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="boot")
        self._service: Future[Service] = self._pool.submit(self._build)
        self._keys = self._pool.submit(self.read_secret)
        self._pool.shutdown(wait=False)  # takes no more, ends by itself
        wait([self._service])

    def service(self) -> Service:
        """The service with all its keys; its model may still be loading. Raises SettingsError."""
        return self.with_keys(self._keys.result())

    def with_keys(self, found: frozenset[str]) -> Service:
        """The same service with `found` beside the configured keys."""
        settings = dataclasses.replace(self.settings, api_keys=self.settings.api_keys | found)
        return dataclasses.replace(self._service.result(), settings=settings)

    def read_secret(self) -> frozenset[str]:
        """The keys in the secret, none if there is no secret. Raises SettingsError."""
        if self.settings.api_keys_secret is None:
            return frozenset()
        from adapters.aws_lambda.secret import read_keys

        with self.timeline.phase("secret"):
            return read_keys(self.settings.api_keys_secret, self._environ)

    def _build(self) -> Service:
        with self.timeline.phase("wiring"):
            from adapters.wiring import build

            service = build(self.settings, self.timeline, on_lambda=True)
        service.host.start(load=True)  # whatever AUTO_PRELOAD says: init is the one time that costs no request
        return service
