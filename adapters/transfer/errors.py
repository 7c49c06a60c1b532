"""Translate HTTP statuses into the errors of a download."""

from __future__ import annotations

import re

from adapters.transfer.connection import ConnectionBroken
from adapters.transfer.retry import is_transient
from core.errors import ModelUnavailable
from core.store.source import Damaged

MAX_ERROR_BODY = 64 << 10  # bytes of an error response that are read


class Refused(Exception):
    """401, 403 or a redirect. Worth one retry with new credentials or a new address."""


class WrongBytes(ConnectionBroken):
    """A block does not match its digest in the manifest."""


def reason_of(status: int, body: bytes) -> str:
    """Return the status and S3's error code, for logs and messages."""
    code = re.search(rb"<Code>(\w{1,64})</Code>", body)
    return f"HTTP {status}" + (f" {code[1].decode()}" if code else "")


def error_of(status: int, body: bytes, name: str) -> Exception:
    """Return the error for a response of this status: Refused, ConnectionBroken (retry) or ModelUnavailable (final).

    `name` is the object's name for messages.
    """
    reason = reason_of(status, body)
    if status == 200:
        return ModelUnavailable(f"{name} cannot be read in ranges: the server ignores the Range header.")
    if status in (401, 403) or 300 <= status < 400 or (status == 400 and "Token" in reason):
        return Refused(reason)
    if status in (404, 410):
        return Damaged(f"{name} no longer exists ({reason}).")
    if status in (412, 416):
        return Damaged(f"{name} was replaced during the download ({reason}). Try again.")
    if is_transient(status):
        return ConnectionBroken(reason)
    return ModelUnavailable(f"{name} could not be read ({reason}).")
