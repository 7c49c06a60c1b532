"""Build a Service from the environment and start loading its model.

The load begins first, in a thread. Everything else of a cold start (importing the application, reading the secret) runs
while tensors load, but not earlier: two threads that import share one interpreter lock, and each takes twice as long.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from core.settings import Settings, SettingsError, weak_key_warnings
from core.timeline import Timeline

if TYPE_CHECKING:
    from core.service import Service


# The values of AWS_LAMBDA_LOG_LEVEL, which LoggingConfig.ApplicationLogLevel sets, as values of LOG_LEVEL.
_LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARN": "warning", "ERROR": "error", "FATAL": "error"}


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set what Lambda and the image decide, unless the function's configuration sets it.

    Lambda's file system is read-only except for /tmp, and its user has no home. The image sets BAKED_MODEL to the model
    that it contains, so no deployment can name a file that is not in the image.
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
    """Read the settings. Raises SettingsError, also for a function URL without keys or IAM."""
    settings = Settings.from_env(environ)
    if not (settings.api_keys or settings.api_keys_secret or settings.iam_auth):
        raise SettingsError(
            "API_KEYS or API_KEYS_SECRET must be set: anyone can call a function URL with AuthType NONE. "
            "If the URL has AuthType AWS_IAM, set IAM_AUTH=true."
        )
    return settings


class Start:
    """Read the settings and start loading the model. Raises SettingsError."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.timeline = Timeline()
        set_defaults(environ)
        self.settings = read_settings(environ)
        self._environ = environ
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="start")
        self._service: Future[Service] = self._pool.submit(self._build)
        self._keys = self._pool.submit(self.read_secret)
        self._pool.shutdown(wait=False)  # its threads end after these two tasks
        wait([self._service])

    def service(self) -> Service:
        """Return the service with all its keys. Its model may still be loading. Raises SettingsError.

        Configure the logs first: a weak key in the environment is logged here.
        """
        import logging

        for warning in weak_key_warnings(self._environ):
            logging.getLogger("slm.lambda").warning("%s", warning)
        return self.with_keys(self._keys.result())

    def with_keys(self, secret: frozenset[str]) -> Service:
        """Return the service with the configured keys and those of the secret."""
        settings = dataclasses.replace(self.settings, api_keys=self.settings.api_keys | secret)
        return dataclasses.replace(self._service.result(), settings=settings)

    def read_secret(self) -> frozenset[str]:
        """Return the keys in the secret, or none without a secret. Raises SettingsError."""
        if self.settings.api_keys_secret is None:
            return frozenset()
        from adapters.aws.secrets import read_keys

        with self.timeline.phase("secret"):
            return read_keys(self.settings.api_keys_secret, self._environ)

    def _build(self) -> Service:
        with self.timeline.phase("wiring"):
            from adapters.wiring import build

            service = build(self.settings, self.timeline, on_lambda=True)
        service.host.start(load=True)  # regardless of AUTO_PRELOAD: during init no request waits
        return service
