"""Compute checksums over a whole object: sha256, and those that S3 stores by itself."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Checksum(Protocol):
    """A check over a whole object."""

    def update(self, data: memoryview, /) -> None: ...

    def matches(self) -> bool: ...


class Sha256:
    """A sha256 in hex."""

    def __init__(self, expected: str) -> None:
        self._expected, self._hash = expected.lower(), hashlib.sha256()
        self.update = self._hash.update

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._expected


class Crc:
    """A CRC. `function(data, value)` updates it."""

    def __init__(self, function: Callable[[memoryview, int], int], expected: int) -> None:
        self._function, self._expected, self._value = function, expected, 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def matches(self) -> bool:
        return self._value == self._expected


def s3_values(headers: Mapping[str, str]) -> dict[str, bytes]:
    """Return the whole-object checksums in the response to a HEAD with x-amz-checksum-mode, by algorithm.

    COMPOSITE checksums of multipart uploads are skipped: they are checksums of the parts' checksums.
    """
    if headers.get("x-amz-checksum-type", "FULL_OBJECT") != "FULL_OBJECT":
        return {}
    values = {}
    for algorithm, length in (("sha256", 32), ("crc64nvme", 8), ("crc32", 4)):
        try:
            value = base64.b64decode(headers.get(f"x-amz-checksum-{algorithm}", ""), validate=True)
        except binascii.Error:
            continue  # for example "...-<parts>", a composite one without its type
        if len(value) == length:
            values[algorithm] = value
    return values


def strongest(values: Mapping[str, bytes]) -> Checksum | None:
    """Return the strongest check available here. With None, only ETag, size and GGUF header are checked."""
    if "sha256" in values:
        return Sha256(values["sha256"].hex())
    if "crc64nvme" in values and (crc64 := _crc64nvme()) is not None:
        return Crc(crc64, int.from_bytes(values["crc64nvme"], "big"))
    if "crc32" in values:
        return Crc(zlib.crc32, int.from_bytes(values["crc32"], "big"))
    return None


def _crc64nvme() -> Any:
    """Return awscrt's CRC64NVME, which S3 adds to new objects by itself. Pure Python would take minutes."""
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:
        return None
    return crc64nvme
