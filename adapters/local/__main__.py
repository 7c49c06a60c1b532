"""Local: `python -m adapters.local`, the server on one machine. Reads .env and the environment, runs uvicorn."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from adapters.local.admin_key import admin_key
from core.settings import LEAST_KEY_LENGTH, Settings, SettingsError, keys, weak_keys
from core.timeline import Timeline
from core.version import VERSION

ONE_WORKER = (
    "one worker only: the model lies in one process's memory and serves all requests from there, "
    "batched; N_PARALLEL says how many run at once"
)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 stopped as asked, 2 not startable as configured, 1 anything else."""
    timeline = Timeline()
    options = _parser().parse_args(arguments)
    environ = environment()
    try:
        settings = configured(options, environ)
    except SettingsError as error:
        print(f"slm-api-server: {error}", file=sys.stderr)  # noqa: T201 - logging is not set up without settings
        return 2
    for name in weak_keys(environ):
        print(  # noqa: T201 - as above
            f"slm-api-server: warning: {name} contains a key shorter than {LEAST_KEY_LENGTH} characters, which can be "
            "guessed. Generate one with: openssl rand -hex 32",
            file=sys.stderr,
        )
    return serve(settings, timeline)


def environment() -> Mapping[str, str]:
    """The process's variables over those in ./.env; libraries that read HF_HOME and the like see them too."""
    from dotenv import load_dotenv

    load_dotenv(Path(".env"), override=False)
    return os.environ


def configured(options: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings, checked for what only a server of its own can get wrong. Raises SettingsError."""
    if environ.get("WEB_CONCURRENCY", "1").strip() not in ("", "1"):
        raise SettingsError(f"WEB_CONCURRENCY must be 1 or unset: {ONE_WORKER}")
    if options.workers != 1:
        raise SettingsError(f"--workers must be 1: {ONE_WORKER}")
    given = {"HOST": options.host, "PORT": options.port}
    settings = Settings.from_env({**environ, **{name: value for name, value in given.items() if value is not None}})
    if not settings.api_keys and not settings.allow_anonymous and not _is_loopback(settings.host):
        raise SettingsError(
            f"HOST {settings.host} is open to others and API_KEYS is empty: set API_KEYS, or "
            "ALLOW_ANONYMOUS=true if everyone who reaches this address may use the model, or HOST=127.0.0.1"
        )
    return settings


def with_admin_key(settings: Settings) -> tuple[Settings, str | None]:
    """Without ADMIN_API_KEYS, a key of the server's own and the line that shows it; nothing where LOCAL_ADMIN replaces
    it."""
    if settings.admin_api_keys or (settings.local_admin and not settings.api_keys):
        return settings, None
    key, file = admin_key(settings.models_dir)
    where = f"kept in {file}" if file else "for this run; set ADMIN_API_KEYS for one that stays"
    return dataclasses.replace(settings, admin_api_keys=keys(key)), f"admin key for /load and /reload: {key} ({where})"


def serve(settings: Settings, timeline: Timeline) -> int:
    """Bind, say so, serve until SIGTERM or Ctrl-C, and let running answers finish within SHUTDOWN_GRACE_S."""
    signal.signal(signal.SIGTERM, _terminated)
    with timeline.phase("import service"):
        from adapters import logs
        from adapters.wiring import build

    logs.configure(settings)
    settings, key_line = with_admin_key(settings)
    service = build(settings, timeline)
    service.host.start()  # llama.cpp loads while Python imports the server
    with timeline.phase("import server"):
        from adapters.local.terminal import ProgressLine, banner
        from adapters.serving.server import Server, address_of, listen

    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or "no such address"
        print(f"slm-api-server: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)  # noqa: T201
        return 1
    first_lines = banner(address_of(listener), settings, service.host.state(), VERSION)
    print("\n".join(filter(None, (first_lines, key_line))), flush=True)  # noqa: T201
    progress = ProgressLine(service.host.state) if sys.stderr.isatty() else None
    if progress is not None:
        progress.start()
    try:
        Server(service).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn has shut down, and passes on the Ctrl-C that told it to
    finally:
        listener.close()
        if progress is not None:
            progress.stop()
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM outside uvicorn's own handling (before it, and passed on after it): a normal end, not a crash."""
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
        description="A private, OpenAI-compatible API for small GGUF models. Configured by the environment and ./.env; "
        "docs/settings.md lists all variables.",
    )
    parser.add_argument("--host", help="address to listen on (HOST, default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on, 0 for any free one (PORT, default 8000)")
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"slm-api-server {VERSION}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
