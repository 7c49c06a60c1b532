"""Configure logging: text in a terminal, JSON lines elsewhere, with the request id in each line.

Only entry points call `configure`.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any, TextIO

import msgspec

from core.settings import Settings
from handlers.http import platform, request_id

# At level debug these loggers print headers and signed URLs, which contain tokens and keys.
_CREDENTIAL_LOGGERS = (
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
    """Send every log line to `stream` (default: stderr) in the format of LOG_FORMAT, from LOG_LEVEL on."""
    stream = stream or sys.stderr
    text = settings.log_format == "text" or (settings.log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Text() if text else Json(settings.emf_namespace))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _CREDENTIAL_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


class Text(logging.Formatter):
    """Format a line as `12:00:01 INFO message [request id]`, with the traceback of an exception below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).rstrip()
        identity = request_id.get()
        return f"{line} [{identity}]" if identity else line


# CloudWatch filters by these names. It does not know Python's WARNING and CRITICAL.
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}


# The fields of an access-log line that are metrics, and CloudWatch's names of their units.
_METRICS = {
    "prompt_tokens": "Count",
    "cached_tokens": "Count",
    "completion_tokens": "Count",
    "latency_ms": "Milliseconds",
    "first_token_ms": "Milliseconds",
    "queue_ms": "Milliseconds",
    "prefill_ms": "Milliseconds",
    "decode_ms": "Milliseconds",
}


class Json(logging.Formatter):
    """Format a line as one JSON object with the keys that CloudWatch and Lambda's log filter read.

    Lambda filters by `timestamp` (RFC 3339) and `level`. It treats a line without a valid timestamp as INFO.
    `requestId` is the platform's id of the request, as in Lambda's reports, and `clientRequestId` the one that the
    client sent. Without a platform `requestId` is the client's or a generated one. The fields of
    `extra={"fields": ...}` come last. With `emf_namespace`, the line of a request to the model is also a document of
    CloudWatch's embedded metric format.
    """

    def __init__(self, emf_namespace: str | None = None) -> None:
        super().__init__()
        self._emf_namespace = emf_namespace

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
        if platform_ids := platform.get():
            line |= platform_ids
            if identity and identity != platform_ids.get("requestId"):
                line["clientRequestId"] = identity
        fields = getattr(record, "fields", {})
        line |= fields
        if self._emf_namespace is not None and _METRICS.keys() <= fields.keys():
            line["_aws"] = _directive(self._emf_namespace, record.created)
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["errorType"] = type(error).__name__
            line["errorMessage"] = str(error)
            line["stackTrace"] = [part.rstrip() for part in traceback.format_exception(error)]
        return msgspec.json.encode(line, enc_hook=str).decode()


def _directive(namespace: str, created: float) -> dict[str, Any]:
    """Return what tells CloudWatch which fields of a line are metrics. The only dimension is the model."""
    metrics = [{"Name": name, "Unit": unit} for name, unit in _METRICS.items()]
    return {
        "Timestamp": int(created * 1000),
        "CloudWatchMetrics": [{"Namespace": namespace, "Dimensions": [["model"]], "Metrics": metrics}],
    }
