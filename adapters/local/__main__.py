"""Run the server on one machine: `python -m adapters.local`. Settings come from the environment and ./.env."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from adapters.local.admin_key import admin_key
from core.settings import Settings, SettingsError, keys, weak_key_warnings
from core.timeline import Timeline
from core.version import VERSION

ONE_WORKER = (
    "the server runs one worker only, because one process holds the model and batches all requests. N_PARALLEL sets "
    "how many run at once"
)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 after a normal stop, 2 if a setting is wrong, 1 for any other failure."""
    timeline = Timeline()
    options = _parser().parse_args(arguments)
    environ = environment()
    try:
        settings = configured(options, environ)
    except SettingsError as error:
        print(f"slm-api-server: {error}", file=sys.stderr)  # noqa: T201 - logging is not set up without settings
        return 2
    for warning in weak_key_warnings(environ):
        print(f"slm-api-server: warning: {warning}", file=sys.stderr)  # noqa: T201 - as above
    return serve(settings, timeline)


def environment() -> Mapping[str, str]:
    """Return the environment with the variables of ./.env added. Libraries that read HF_HOME and such see them too."""
    from dotenv import load_dotenv

    load_dotenv(Path(".env"), override=False)
    return os.environ


def configured(options: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Return the settings of the command line and `environ`. Raise SettingsError if they are not safe to serve."""
    if environ.get("WEB_CONCURRENCY", "1").strip() not in ("", "1"):
        raise SettingsError(f"WEB_CONCURRENCY must be 1 or unset: {ONE_WORKER}")
    if options.workers != 1:
        raise SettingsError(f"--workers must be 1: {ONE_WORKER}")
    flags = {"HOST": options.host, "PORT": options.port}
    settings = Settings.from_env({**environ, **{name: value for name, value in flags.items() if value is not None}})
    if not settings.api_keys and not settings.allow_anonymous and not _is_loopback(settings.host):
        raise SettingsError(
            f"HOST={settings.host} can be reached from other machines, and API_KEYS is empty: set API_KEYS, or "
            "HOST=127.0.0.1, or ALLOW_ANONYMOUS=true if everyone who reaches this address may use the model"
        )
    return settings


def with_admin_key(settings: Settings) -> tuple[Settings, str | None]:
    """Add a generated admin key unless ADMIN_API_KEYS or LOCAL_ADMIN is set. Return the line that shows the key."""
    if settings.admin_api_keys or (settings.local_admin and not settings.api_keys):
        return settings, None
    key, file = admin_key(settings.models_dir)
    where = f"stored in {file}" if file else "valid for this run; set ADMIN_API_KEYS for a permanent one"
    return dataclasses.replace(settings, admin_api_keys=keys(key)), f"Admin key for /load and /reload: {key} ({where})"


def serve(settings: Settings, timeline: Timeline) -> int:
    """Serve until SIGTERM or Ctrl-C, then let running answers finish within SHUTDOWN_GRACE_S."""
    # 1) Build the service and start it.
    signal.signal(signal.SIGTERM, _terminated)
    with timeline.phase("import service"):
        from adapters import logs
        from adapters.wiring import build

    logs.configure(settings)
    settings, key_line = with_admin_key(settings)
    service = build(settings, timeline)
    service.host.start()  # with AUTO_PRELOAD llama.cpp loads while Python imports the server
    with timeline.phase("import server"):
        from adapters.local.terminal import ProgressLine, banner
        from adapters.serving.server import Server, address_of, listen

    # 2) Bind, then print the banner.
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or "the address does not exist"
        print(f"slm-api-server: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)  # noqa: T201
        return 1
    first_lines = banner(address_of(listener), settings, service.host.state(), VERSION)
    print("\n".join(filter(None, (first_lines, key_line))), flush=True)  # noqa: T201
    progress = ProgressLine(service.host.state) if sys.stderr.isatty() else None
    if progress is not None:
        progress.start()
        for handler in logging.getLogger().handlers:
            progress.keep_clear_of(handler)
    # 3) Serve.
    try:
        Server(service).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the Ctrl-C again after it has shut down
    finally:
        listener.close()
        if progress is not None:
            progress.stop()
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Exit normally on a SIGTERM that arrives before uvicorn handles signals, or that uvicorn raises again."""
    raise SystemExit(0)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.local",
        description="Serve an OpenAI-compatible API for small GGUF models. Settings come from the environment and "
        "./.env; docs/settings.md lists them all.",
    )
    parser.add_argument("--host", help="address to listen on (HOST, default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on, 0 for any free one (PORT, default 8000)")
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"slm-api-server {VERSION}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
