"""The GGUF header check: what it reads, and which files it refuses."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.store import gguf
from tests import gguf_files as files
from tests.gguf_files import ARRAY, F32, I32, STRING, U8, U32


def parse(content: bytes, size: int | None = None) -> gguf.Header:
    return gguf.parse_header(lambda at, length: content[at : at + length], len(content) if size is None else size)


def valid_file() -> bytes:
    return files.gguf(files.llama_metadata(n_vocab=260), [("a", (8, 2), bytes(64)), ("b", (3,), bytes(12))])


def file_with(**entries: Any) -> bytes:
    """Return a model with some metadata replaced. None removes a key."""
    merged = {**files.llama_metadata(n_vocab=260), **{key.replace("__", "."): value for key, value in entries.items()}}
    return files.gguf({key: value for key, value in merged.items() if value}, [("a", (8,), bytes(32))])


def test_a_header_describes_the_model() -> None:
    """Architecture, name, tensors and where their data begins come from the header alone."""
    content = valid_file()
    header = parse(content)

    assert (header.version, header.alignment) == (3, 32)
    assert (header.metadata["general.architecture"], header.metadata["general.name"]) == ("llama", "tiny")
    assert header.tensors == (gguf.Tensor("a", 0, (8, 2), 0, 64), gguf.Tensor("b", 0, (3,), 64, 12))
    assert header.metadata["tokenizer.ggml.tokens"] == gguf.Array(STRING, 260)
    assert header.data_offset % 32 == 0
    assert header.size_bytes == header.data_offset + 64 + 12
    assert header.split == (0, 1)


def test_only_the_header_is_read() -> None:
    """Of a large file, only the header and one read-ahead are read."""
    content = files.padded_model(8 << 20)
    read_end = 0

    def pread(at: int, length: int) -> bytes:
        nonlocal read_end
        read_end = max(read_end, at + length)
        return content[at : at + length]

    gguf.parse_header(pread, len(content))

    assert read_end <= 1 << 20


def test_short_reads_are_continued() -> None:
    """A reader that returns a few bytes at a time gives the same header."""
    content = valid_file()

    assert gguf.parse_header(lambda at, length: content[at : at + min(length, 7)], len(content)) == parse(content)


def test_every_truncation_is_refused() -> None:
    """The end of the last tensor is the earliest valid end."""
    content = valid_file()
    size = parse(content).size_bytes
    for cut in [*range(0, size, 7), *range(size - 150, size)]:
        with pytest.raises(gguf.MalformedGGUF, match=r"truncated|GGUF|can hold"):
            parse(content[:cut])


def test_a_file_that_ends_while_it_is_read_is_refused() -> None:
    """A file shorter than its size does not cause an endless loop."""
    with pytest.raises(gguf.MalformedGGUF, match="truncated"):
        parse(valid_file()[:5000], size=1 << 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"\x7fELF" + bytes(100), "another kind"),
        (b"<!DOCTYPE html>" + bytes(100), "another kind"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "claims .* tensors"),
        (b"GGUF" + struct.pack("<IqQ", 3, -1, 0), "claims -1 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "at most 65535"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string(""), "empty"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<I", 13), "unknown type 13"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<IIQ", 9, 9, 1),
            "unknown type 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<IIQ", 9, 8, 1 << 60),
            "more than the file can hold",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<IIQ", 9, 10, (1 << 64) - 1),
            "truncated or damaged",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * files.metadata({"k": (U8, 1)}), "duplicate metadata key"),
        (file_with(general__alignment=(U32, 48)), "alignment 48"),
        (file_with(general__alignment=(U32, 0)), "alignment 0"),
        (file_with(general__alignment=(U32, 8)), "alignment 8"),
        (file_with(general__alignment=(STRING, "32")), "alignment '32'"),
        (file_with(general__architecture=None), "no general.architecture"),
        (file_with(general__architecture=(STRING, "clip")), "not a language model"),
        (file_with(general__type=(STRING, "adapter")), "not a language model"),
        (file_with(llama__block_count=(U32, 0)), "claims 0 layers"),
        (file_with(llama__block_count=(U32, 513)), "claims 513 layers"),
        (file_with(llama__nextn_predict_layers=(U32, 2)), "2 prediction layers"),
        (file_with(llama__attention__head_count_kv=(U32, (1 << 31) + 2)), "head_count_kv = 2147483650"),
        (file_with(llama__attention__layer_norm_rms_epsilon=(F32, -1e-5)), "epsilon = -1e-05"),
        (file_with(llama__attention__layer_norm_rms_epsilon=(F32, float("nan"))), "epsilon = nan"),
        (file_with(llama__rope__scaling__type=(STRING, "linfar")), "rope scaling 'linfar'"),
        (file_with(llama__expert_count=(U32, 2000), llama__expert_used_count=(U32, 2)), "2000 experts"),
        (file_with(llama__expert_count=(U32, 4), llama__expert_used_count=(U32, 8)), "uses 8 of 4"),
        (file_with(llama__expert_used_count=(U32, 1)), "uses 1 of 0"),
        (
            file_with(
                llama__expert_count=(U32, 4), llama__expert_used_count=(U32, 2), llama__expert_group_count=(U32, 3)
            ),
            "3 groups",
        ),
        (files.gguf(files.llama_metadata(n_vocab=260)), "no tensors"),
        (file_with(tokenizer__ggml__tokens=(ARRAY, STRING, ["a", "b", "a"])), "1 duplicate tokens"),
        (file_with(tokenizer__ggml__tokens=(ARRAY, STRING, ["", "[EMPTY_0]"])), "1 duplicate tokens"),
        (file_with(tokenizer__ggml__tokens=(ARRAY, STRING, ["", "", "a", "", "a"])), "1 duplicate tokens"),
        (files.gguf(files.llama_metadata(), [("a", (2,), bytes(8)), ("a", (2,), bytes(8))]), "duplicate tensor"),
        (files.gguf(files.llama_metadata(), [("n" * 64, (2,), bytes(8))]), "64 bytes; at most 63"),
        (files.gguf(files.llama_metadata(), [("a", (1, 1, 1, 1, 1), bytes(4))]), "5 dimensions"),
        (files.gguf(files.llama_metadata(), [("a", (0,), b"")]), "dimension of 0"),
        (files.gguf(files.llama_metadata(), [("a", (-4,), bytes(4))]), "dimension of -4"),
        (files.gguf(files.llama_metadata(), [("a", (1 << 40, 1 << 40), bytes(4))]), "no file can hold"),
        (files.gguf(files.llama_metadata(), [("a", (1 << 30,), bytes(4))]), "truncated: its tensors need"),
        (files.gguf(files.llama_metadata(), [("a", (8,), bytes(96)), ("b", (8,), bytes(32))]), "expected at 32"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    """Absurd counts, hostile strings, types and offsets each have their own message."""
    with pytest.raises(gguf.MalformedGGUF, match=reason):
        parse(content)


def test_a_tensor_of_an_unknown_type_is_refused() -> None:
    """llama.cpp does not know this type or has removed it, so loading would fail later."""
    content = bytearray(files.gguf({**files.llama_metadata()}, [("a", (8,), bytes(32))]))
    at = content.index(files.string("a") + struct.pack("<Iq", 1, 8)) + 8 + 1 + 4 + 8
    content[at : at + 4] = struct.pack("<I", 31)

    with pytest.raises(gguf.MalformedGGUF, match="type 31"):
        parse(bytes(content))


def test_rows_of_partial_blocks_are_refused() -> None:
    """Quantised rows consist of whole blocks; llama.cpp would divide and compute a wrong size."""
    content = bytearray(files.gguf({**files.llama_metadata()}, [("a", (8,), bytes(32))]))
    at = content.index(files.string("a") + struct.pack("<Iq", 1, 8)) + 8 + 1 + 4 + 8
    content[at : at + 4] = struct.pack("<I", 2)

    with pytest.raises(gguf.MalformedGGUF, match="multiple of 32"):
        parse(bytes(content))


@pytest.mark.parametrize("counts", [[33_000_000], [7_000_000], [(1 << 21) + 1]])
def test_a_header_of_millions_of_strings_is_refused_unread(counts: list[int]) -> None:
    """Each string would become a Python object, while a compressed file of zeros is tiny. So the number is limited."""
    refuse_strings(counts)


def test_the_strings_of_all_arrays_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_STRINGS", 1000)
    refuse_strings([500, 500, 1])


def refuse_strings(counts: list[int]) -> None:
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, len(counts))
    for index, count in enumerate(counts):
        content += files.string(f"array.{index}") + struct.pack("<IIQ", 9, 8, count)
        content += bytes(8 * count if index < len(counts) - 1 else 0)
    with pytest.raises(gguf.MalformedGGUF, match=r"strings in its arrays; at most|more than the file can hold"):
        parse(content, 1 << 30)


def test_a_hostile_string_is_not_read_into_memory() -> None:
    """A string longer than the file is refused before it is read."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<IQ", STRING, 1 << 40)

    with pytest.raises(gguf.MalformedGGUF, match="at most"):
        parse(content, size=1 << 50)


def test_a_header_beyond_the_bound_is_refused() -> None:
    """An array may not make the header larger than any real one, however large the file is."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.string("k") + struct.pack("<IIQ", ARRAY, F32, 1 << 30)

    with pytest.raises(gguf.MalformedGGUF, match="header over"):
        parse(content, size=1 << 40)


def test_invalid_utf8_is_accepted() -> None:
    """llama.cpp does not require UTF-8 names, so neither does the check; the parsed name can be encoded."""
    header = parse(
        files.gguf({**files.llama_metadata(), "general.name": (STRING, b"\xff\xfe")}, [("a", (1,), bytes(4))])
    )

    header.metadata["general.name"].encode()


def test_parts_of_a_split_model_are_accepted() -> None:
    """Later parts need no architecture. Each part has its number and the count."""
    parts = files.split_model("big", 3)

    assert [parse(content).split for content in parts.values()] == [(0, 3), (1, 3), (2, 3)]


def _mutants(seed: int, count: int) -> list[bytes]:
    """Return models with flipped bits, extreme numbers, missing or doubled pieces, or a missing end."""
    draw = random.Random(seed)
    content = files.gguf(files.llama_metadata(n_vocab=260), [("a", (8, 2), bytes(64)), ("b", (3,), bytes(12))])
    mutants = []
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            at = draw.randrange(len(mutant))
            match draw.randrange(5):
                case 0 | 1:
                    mutant[at] ^= 1 << draw.randrange(8)
                case 2:
                    extreme = draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1))
                    mutant[at : at + 8] = struct.pack("<Q", extreme)
                case 3:
                    del mutant[at : at + draw.randrange(1, 64)]
                case 4:
                    mutant[at:at] = mutant[at : at + draw.randrange(1, 64)]
        mutants.append(bytes(mutant[: draw.randrange(len(mutant))] if draw.random() < 0.1 else mutant))
    return mutants


def test_mutated_files_are_refused_or_sound() -> None:
    """A damaged file raises MalformedGGUF or has all its tensors."""
    refused = 0
    for mutant in _mutants(seed=1, count=2000):
        try:
            header = parse(mutant)
        except gguf.MalformedGGUF:
            refused += 1
            continue
        assert header.size_bytes <= len(mutant)
        assert all(tensor.offset % header.alignment == 0 for tensor in header.tensors)

    assert refused > 400


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(tail: bytes) -> None:
    """Bytes after a valid beginning raise MalformedGGUF and no other error."""
    with pytest.raises(gguf.MalformedGGUF):
        parse(b"GGUF" + struct.pack("<I", 3) + tail)


def test_the_block_table_matches_llama_cpp() -> None:
    """Block and type sizes equal those of the installed libggml."""
    import ctypes
    import importlib.util

    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    for kind in range(max(gguf.BLOCKS) + 1):
        expected = (library.ggml_blck_size(kind), library.ggml_type_size(kind))
        assert gguf.BLOCKS.get(kind, (0, 0)) == expected, kind


def test_metadata_arrays_are_skipped() -> None:
    """Only their type and length are stored, which takes no memory."""
    header = parse(file_with(x=(ARRAY, I32, [1, 2, 3]), y=(ARRAY, F32, []), z=(ARRAY, STRING, ["", "é"])))

    assert header.metadata["x"] == gguf.Array(I32, 3)
    assert header.metadata["y"] == gguf.Array(F32, 0)
    assert header.metadata["z"] == gguf.Array(STRING, 2)
