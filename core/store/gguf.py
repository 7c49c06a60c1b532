"""Read and check the header of a GGUF file, so that no malformed file reaches llama.cpp.

This checks what llama.cpp's own reader checks (ggml/src/gguf.cpp), and what ends its process: duplicate tokens
(GGML_ASSERT in llama-vocab.cpp) and tensor data that is not 32-byte aligned (ggml-backend.cpp). Only the header is
read: 1.8 MB of SmolLM2's 98, 6.5 MB of Gemma 3's 253.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.store.architecture import find_kind, may_embed
from core.store.hyperparameters import find_fault

MAGIC = b"GGUF"
MAX_HEADER = 64 << 20  # bytes; the largest vocabularies (262144 tokens with merges) need about 16 MB
MAX_STRINGS = 1 << 21  # in all arrays; those vocabularies have some 780000. Each costs a microsecond and up to 80 bytes
MAX_METADATA = 1 << 16  # keys, and tensors: the largest models have some thousands
MAX_KEY = 65535  # bytes of a key, by the GGUF specification
KEEP = 1 << 20  # metadata strings over this many bytes are not kept; chat templates have up to some 50 kB
MAPPABLE = 32  # TENSOR_ALIGNMENT of ggml-backend

_READ = 1 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_WIDTHS = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()}

# ggml type: (values in a block, bytes of a block), from ggml_blck_size and ggml_type_size of llama.cpp in
# llama-cpp-python 0.3.36; a test compares. Types that are not here were removed or are not known to it.
BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


class MalformedGGUF(ValueError):
    """Not a GGUF file that llama.cpp can load. The message completes "<file> ..." and may go to a client."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """`offset` counts from the start of the data section."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Array:
    """Type and length of an array in the metadata; its values are not kept."""

    type: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    version: int
    alignment: int
    data_offset: int  # where the tensors begin, after metadata and vocabulary
    size_bytes: int  # the least size of the file
    metadata: Mapping[str, Any]  # scalars and strings; an Array for each array
    tensors: tuple[Tensor, ...]

    @property
    def split(self) -> tuple[int, int]:
        """Return the index (from 0) of this file in its split model, and the number of files: (0, 1) if not split."""
        count = self.metadata.get("split.count")
        index = self.metadata.get("split.no", 0)
        return (index, count) if isinstance(count, int) and isinstance(index, int) and count > 1 else (0, 1)


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`. Raise MalformedGGUF or OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return parse_header(lambda offset, length: os.pread(descriptor, length, offset), size)
    finally:
        os.close(descriptor)


def parse_header(pread: Callable[[int, int], bytes], size: int, *, checked: bool = False) -> Header:
    """Return the header of a file of `size` bytes. `pread(offset, length)` may block until the bytes arrive.

    Raise MalformedGGUF with the reason, also if the tensors need more than `size` bytes. With `checked`, the same bytes
    (by sha256) have passed before, and the search for duplicate tokens is skipped: 52 ms instead of 143 for Gemma 3.
    """
    reader = _Reader(pread, size, unique_tokens=not checked)
    if reader.take(4) != MAGIC:
        raise MalformedGGUF("does not begin with 'GGUF': it is another kind of file")
    version = reader.scalar("<I")
    if version & 0xFFFF == 0:
        raise MalformedGGUF("is a big-endian GGUF; this machine needs a little-endian one")
    if version not in (2, 3):
        raise MalformedGGUF(f"is GGUF version {version}; versions 2 and 3 can be read")
    n_tensors, n_keys = reader.scalar("<q"), reader.scalar("<q")
    for count, what in ((n_tensors, "tensors"), (n_keys, "metadata keys")):
        if not 0 <= count <= MAX_METADATA:
            raise MalformedGGUF(f"claims {count} {what}; 0 to {MAX_METADATA} can be right")
    metadata = _read_metadata(reader, n_keys)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not MAPPABLE <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise MalformedGGUF(f"has alignment {alignment!r:.40}; a power of 2 from {MAPPABLE} on can be mapped")
    tensors, end = _read_tensors(reader, n_tensors, alignment)
    data_offset = -(-reader.position // alignment) * alignment
    header = Header(
        version, alignment, data_offset, data_offset + end if tensors else reader.position, metadata, tensors
    )
    if header.size_bytes > size:
        raise MalformedGGUF(f"is truncated: its tensors need {header.size_bytes} bytes, it has {size}")
    if not header.split[0]:
        _check_model(header)
    return header


def _read_metadata(reader: _Reader, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        key = reader.text(MAX_KEY, f"metadata key {index}")
        if not key or key in metadata:
            raise MalformedGGUF(f"has {'an empty' if not key else 'the duplicate'} metadata key {key!r:.80}")
        kind = reader.scalar("<I")
        if kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        elif kind == _STRING:
            metadata[key] = reader.text(MAX_HEADER, f"the string {key!r:.80}", keep=KEEP)
        elif kind == _ARRAY:
            metadata[key] = _read_array(reader, key)
        else:
            raise MalformedGGUF(f"has metadata key {key!r:.80} of the unknown type {kind}")
    return metadata


def _read_array(reader: _Reader, key: str) -> Array:
    kind, length = reader.scalar("<I"), reader.scalar("<Q")
    if kind == _STRING:
        reader.strings(length, key)
    elif kind in _WIDTHS:
        reader.skip(length * _WIDTHS[kind], f"the array {key!r:.80}")
    else:
        raise MalformedGGUF(f"has an array {key!r:.80} of the unknown type {kind}")
    return Array(kind, length)


def _read_tensors(reader: _Reader, n_tensors: int, alignment: int) -> tuple[tuple[Tensor, ...], int]:
    """Return the tensors, and where the last one ends in the data section."""
    tensors: dict[str, Tensor] = {}
    expected = end = 0
    for index in range(n_tensors):
        name = reader.text(63, f"the name of tensor {index}")
        if name in tensors:
            raise MalformedGGUF(f"has the duplicate tensor {name!r:.80}")
        n_dims = reader.scalar("<I")
        if n_dims > 4:
            raise MalformedGGUF(f"has tensor {name!r:.80} with {n_dims} dimensions; at most 4 can be")
        shape = tuple(reader.scalar("<q") for _ in range(n_dims))
        kind, offset = reader.scalar("<I"), reader.scalar("<Q")
        size = _tensor_bytes(name, kind, shape)
        if offset != expected:
            raise MalformedGGUF(f"has tensor {name!r:.80} at offset {offset}, expected at {expected}")
        tensors[name] = Tensor(name, kind, shape, offset, size)
        end = offset + size
        expected = -(-end // alignment) * alignment
        if end > 1 << 62:
            raise MalformedGGUF(f"has tensor {name!r:.80} of {size} bytes, which no file can hold")
    return tuple(tensors.values()), end


def _tensor_bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind not in BLOCKS:
        raise MalformedGGUF(f"has tensor {name!r:.80} of type {kind}, which llama.cpp here does not know")
    values, block = BLOCKS[kind]
    elements = 1
    for length in shape:
        if length < 1:
            raise MalformedGGUF(f"has tensor {name!r:.80} with a dimension of {length}")
        elements *= length
    if (shape[0] if shape else 1) % values:
        raise MalformedGGUF(f"has tensor {name!r:.80} with rows of {shape[:1]} values, not a multiple of {values}")
    return elements // values * block


def _check_model(header: Header) -> None:
    """Check what the first (or only) file of a model must contain."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise MalformedGGUF("names no general.architecture: it is not a model")
    if architecture == "clip" or header.metadata.get("general.type", "model") in ("adapter", "mmproj"):
        raise MalformedGGUF("is an adapter or projector, not a language model")
    kind = find_kind(header.metadata, architecture)
    if kind is not None and not may_embed(kind):
        raise _cannot_generate(kind, architecture)
    if (fault := find_fault(header.metadata, architecture)) is not None:
        raise MalformedGGUF(fault)
    if not header.tensors and header.split == (0, 1):
        raise MalformedGGUF("holds no tensors: it is a vocabulary, not a model")


def check_generates(header: Header) -> None:
    """Raise MalformedGGUF for an embedding model."""
    architecture = header.metadata.get("general.architecture", "")
    if not header.split[0] and (kind := find_kind(header.metadata, architecture)) is not None:
        raise _cannot_generate(kind, architecture)


def _cannot_generate(kind: str, architecture: str) -> MalformedGGUF:
    embeds = "; EMBEDDING_MODEL_PATH serves embedding models" if may_embed(kind) else ""
    return MalformedGGUF(f"is {kind} ({architecture}); only models that generate text can be served{embeds}")


def _distinct(tokens: set[bytes], empty: bytearray) -> int:
    """Return the number of different tokens. `empty` has a 1 for each empty one.

    llama.cpp names an empty token after its index, so these differ, but one may equal a token of that name.
    """
    distinct = len(tokens) + empty.count(1)
    if 1 in empty:
        distinct -= sum(b"[EMPTY_%d]" % index in tokens for index, flag in enumerate(empty) if flag)
    return distinct


class _Reader:
    """A cursor over the header, which is read in growing pieces."""

    def __init__(self, pread: Callable[[int, int], bytes], size: int, *, unique_tokens: bool) -> None:
        self._pread = pread
        self._unique_tokens = unique_tokens
        self._size = size
        self._limit = min(size, MAX_HEADER)
        self._buffer = b""
        self._strings = 0  # in the arrays so far
        self.position = 0

    def _need(self, end: int, what: str) -> None:
        """Read until the buffer holds the bytes up to `end`."""
        if end > self._limit:
            if end > self._size:
                raise MalformedGGUF(
                    f"is truncated or damaged: {what} would end at byte {end}, the file has {self._size}"
                )
            raise MalformedGGUF(f"has a header over {MAX_HEADER >> 20} MiB ({what})")
        while len(self._buffer) < end:
            have = len(self._buffer)
            piece = self._pread(have, min(max(_READ, have, end - have), self._limit - have))
            if not piece:
                raise MalformedGGUF(f"is truncated: it ended at byte {have} while it was read")
            self._buffer += piece

    def take(self, length: int, what: str = "the header") -> bytes:
        end = self.position + length
        if end > len(self._buffer):
            self._need(end, what)
        taken = self._buffer[self.position : end]
        self.position = end
        return taken

    def skip(self, length: int, what: str) -> None:
        self._need(self.position + length, what)
        self.position += length

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, longest: int, what: str, keep: int = 1 << 16) -> str:
        """Return a string, or "" for one over `keep` bytes. Invalid UTF-8, which llama.cpp accepts, is replaced."""
        length = self.scalar("<Q")
        if length > longest:
            raise MalformedGGUF(f"has {what} with {length} bytes; at most {longest} can be right")
        if length > keep:
            self.skip(length, what)
            return ""
        return self.take(length, what).decode("utf-8", "replace")

    def strings(self, count: int, key: str) -> None:
        """Skip an array of strings (vocabulary, merges). One loop, because these are most of the header."""
        unique = self._unique_tokens and key == "tokenizer.ggml.tokens"
        what = f"the array {key!r:.80}"
        if count * 8 > self._limit - self.position:
            raise MalformedGGUF(f"has {what} of {count} strings, more than the file can hold")
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise MalformedGGUF(f"has {self._strings} strings in its arrays; at most {MAX_STRINGS} can be right")
        length_at = _LENGTH.unpack_from
        buffer, position = self._buffer, self.position
        seen: set[bytes] = set()
        empty = bytearray(count if unique else 0)
        for index in range(count):
            start = position + 8
            if start > len(buffer):
                self._need(start, what)
                buffer = self._buffer
            position = start + length_at(buffer, position)[0]
            if unique:
                if position > len(buffer):
                    self._need(position, what)
                    buffer = self._buffer
                if position == start:
                    empty[index] = 1
                else:
                    seen.add(buffer[start:position])
        self._need(position, what)
        if unique and (duplicates := count - _distinct(seen, empty)):
            raise MalformedGGUF(f"has {duplicates} duplicate tokens in its vocabulary")
        self.position = position
