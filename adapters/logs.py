"""Logs: text in a terminal, JSON lines elsewhere, the request's id in each line. Called by entry points only."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any, TextIO

import msgspec

from core.settings import Settings
from handlers.http import platform, request_id

# At debug these print headers and signed URLs, and with them tokens and keys.
_TALKATIVE = (
    "botocore",
    "boto3",
    "s3transfer",
    "urllib3",
    "httpx",
    "httpcore",
    "huggingface_hub",
    "hf_xet",
    "filelock",
)


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send the root logger's lines to `stream` (stderr) in the form that the settings ask for."""
    stream = stream or sys.stderr
    text = settings.log_format == "text" or (settings.log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Text() if text else Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


class Text(logging.Formatter):
    """`12:00:01 info message [request id]`, an exception's traceback below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).rstrip()
        identity = request_id.get()
        return f"{line} [{identity}]" if identity else line


# CloudWatch filters by these names; Python's WARNING and CRITICAL are unknown to it.
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}


class Json(logging.Formatter):
    """One object a line, with the keys that CloudWatch and Lambda's log filter read.

    `timestamp` (RFC 3339) and `level` decide whether Lambda keeps the line: without a valid timestamp it takes every
    line for INFO. `requestId` is the platform's id of the request where there is one (Lambda's reports name it), else
    ours; then `clientRequestId` is ours. What the caller puts into `extra={"fields": ...}` comes last.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = time.gmtime(record.created)
        line: dict[str, Any] = {
            "timestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
            "level": _LEVELS.get(record.levelname, record.levelname),
            "logger": record.name,
            "message": record.getMessage().rstrip(),
        }
        if identity := request_id.get():
            line["requestId"] = identity
        if given := platform.get():
            line |= given
            if identity and identity != given.get("requestId"):
                line["clientRequestId"] = identity
        line |= getattr(record, "fields", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["errorType"] = type(error).__name__
            line["errorMessage"] = str(error)
            line["stackTrace"] = [part.rstrip() for part in traceback.format_exception(error)]
        return msgspec.json.encode(line, enc_hook=str).decode()
