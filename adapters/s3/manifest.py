"""Describe a file in the mirror: the object with its bytes and the digests of its blocks. A small JSON object.

The manifest is written last: a file without one is not in the mirror. The digests verify each block as it arrives; the
ETag ties them to one version of the object.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from adapters.transfer.transfer import MAX_BLOCK_BYTES

FORMAT = 2
SUFFIX = ".manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class MalformedManifest(ValueError):
    """The manifest cannot be read. The message is for the log."""


@dataclass(frozen=True, slots=True)
class Manifest:
    key: str  # of the object with the bytes, in the same bucket
    size_bytes: int
    sha256: str  # of the whole, in hex
    etag: str  # with its quotes, as S3 gives it
    header_bytes: int  # where the tensors begin; the bytes before are downloaded first
    block_bytes: int
    blocks: tuple[str, ...]  # sha256 of each block, in hex
    origin: str = ""  # "hf://org/repo/file.gguf@commit"

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises MalformedManifest."""
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise MalformedManifest(f"format {fields['format']!r} is not known")
            manifest = cls(
                key=fields["key"],
                size_bytes=fields["size_bytes"],
                sha256=fields["sha256"],
                etag=fields["etag"],
                header_bytes=fields["header_bytes"],
                block_bytes=fields["block_bytes"],
                blocks=tuple(fields["blocks"]),
                origin=fields["origin"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise MalformedManifest(f"not a manifest: {error!r}") from error
        manifest._check()
        return manifest

    def digests(self) -> tuple[bytes, ...]:
        return tuple(map(bytes.fromhex, self.blocks))

    def _check(self) -> None:
        numbers = (self.size_bytes, self.header_bytes, self.block_bytes)
        texts = (self.key, self.sha256, self.etag, self.origin, *self.blocks)
        if not all(type(each) is int for each in numbers) or not all(isinstance(each, str) for each in texts):
            raise MalformedManifest("a field has the wrong type")
        if not (0 <= self.header_bytes <= self.size_bytes and 0 < self.block_bytes <= MAX_BLOCK_BYTES):
            raise MalformedManifest("its sizes cannot be right")
        if len(self.blocks) != -(-self.size_bytes // self.block_bytes):
            raise MalformedManifest("its blocks do not cover the object")
        if not all(_SHA256.fullmatch(each) for each in (self.sha256, *self.blocks)):
            raise MalformedManifest("a digest is not a sha256 in hex")
        if not re.fullmatch(r'"[!-~]{1,200}"', self.etag):
            raise MalformedManifest("its ETag cannot be one")
