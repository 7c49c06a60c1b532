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


# Lambda's levels (AWS_LAMBDA_LOG_LEVEL, from LoggingConfig.ApplicationLogLevel) as LOG_LEVEL's.
_LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARN": "warning", "ERROR": "error", "FATAL": "error"}


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Fill in the settings that Lambda and the image decide, where the function's configuration leaves them empty.

    Lambda's file system is read-only except for /tmp, and its user has no home. BAKED_MODEL is the model in the image:
    the image names it, so that no deployment can name a file that the image does not hold.
    """
    home = environ.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        environ["HOME"] = "/tmp"  # noqa: S108 - Lambda's one writable folder, private to the environment
    for name, folder in (("HF_HOME", "/tmp/huggingface"), ("MODELS_DIR", "/tmp/models")):  # noqa: S108 - as above
        if not environ.get(name):
            environ[name] = folder
    if not environ.get("MODEL_PATH") and not environ.get("AUTO_REPO_ID") and environ.get("BAKED_MODEL"):
        environ["MODEL_PATH"] = environ["BAKED_MODEL"]
    if not environ.get("LOG_LEVEL") and (level := _LEVELS.get(environ.get("AWS_LAMBDA_LOG_LEVEL", "").upper())):
        environ["LOG_LEVEL"] = level
    if not environ.get("LOG_FORMAT") and environ.get("AWS_LAMBDA_LOG_FORMAT") in ("JSON", "Text"):
        environ["LOG_FORMAT"] = environ["AWS_LAMBDA_LOG_FORMAT"].lower()


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
        set_defaults(environ)
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
        from adapters.aws.secrets import read_keys

        with self.timeline.phase("secret"):
            return read_keys(self.settings.api_keys_secret, self._environ)

    def _build(self) -> Service:
        with self.timeline.phase("wiring"):
            from adapters.wiring import build

            service = build(self.settings, self.timeline, on_lambda=True)
        service.host.start(load=True)  # whatever AUTO_PRELOAD says: init is the one time that costs no request
        return service
