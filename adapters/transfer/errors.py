"""Refusal: what an answer that does not bring the bytes means for a download."""

from __future__ import annotations

import re

from adapters.transfer.connection import ConnectionBroken
from core.errors import ModelUnavailable
from core.store.source import Damaged


class Refused(Exception):
    """401, 403 or a redirect: worth one try with new credentials or a new address."""


class WrongBytes(ConnectionBroken):
    """A block that is not what the manifest says."""


def error_of(status: int, body: bytes, name: str) -> Exception:
    """Return the error for a response of this status: Refused, ConnectionBroken (retry) or ModelUnavailable (final).

    `name` is the object's, for messages.
    """
    code = re.search(rb"<Code>(\w{1,64})</Code>", body)
    reason = f"HTTP {status}" + (f" {code[1].decode()}" if code else "")
    if status == 200:
        return ModelUnavailable(f"{name} cannot be read in ranges: the server ignores the Range header.")
    if status in (401, 403) or 300 <= status < 400 or (status == 400 and "Token" in reason):
        return Refused(reason)
    if status in (404, 410):
        return Damaged(f"{name} is not there any more ({reason}).")
    if status in (412, 416):
        return Damaged(f"{name} was replaced while it was read ({reason}); try again.")
    if status in (408, 425, 429) or status >= 500:
        return ConnectionBroken(reason)
    return ModelUnavailable(f"{name} could not be read ({reason}).")
