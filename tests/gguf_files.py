"""Make small GGUF files for tests that need a model file but no trained weights."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Typed = tuple[Any, ...]  # (type, value), or (ARRAY, element type, values)
Tensor = tuple[str, tuple[int, ...], bytes]  # of type f32


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    return string(content) if kind == STRING else struct.pack("<" + _CODES[kind], content)


def metadata(entries: Mapping[str, Typed]) -> bytes:
    out = b""
    for key, typed in entries.items():
        out += string(key) + struct.pack("<I", typed[0])
        if typed[0] == ARRAY:
            out += struct.pack("<IQ", typed[1], len(typed[2])) + b"".join(value(typed[1], each) for each in typed[2])
        else:
            out += value(*typed)
    return out


def gguf(
    entries: Mapping[str, Typed], tensors: Sequence[Tensor] = (), *, alignment: int = 32, version: int = 3
) -> bytes:
    """Return the bytes of a GGUF file with f32 tensors."""
    infos, data = b"", b""
    for name, shape, content in tensors:
        infos += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}q", *shape)
        infos += struct.pack("<IQ", 0, len(data))
        data += content + bytes(-len(content) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + metadata(entries) + infos
    return head + bytes(-len(head) % alignment) + data


def vocabulary(size: int = 300) -> dict[str, Typed]:
    """Return a SentencePiece vocabulary that llama.cpp loads: three special tokens, the bytes and words."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [f"word{index}" for index in range(size - len(tokens))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, STRING, tokens),
        "tokenizer.ggml.scores": (ARRAY, F32, [float(-index) for index in range(size)]),
        "tokenizer.ggml.token_type": (ARRAY, I32, kinds),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
    }


def llama_metadata(name: str = "tiny", n_vocab: int = 300) -> dict[str, Typed]:
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, name),
        "general.alignment": (U32, 32),
        "llama.context_length": (U32, 128),
        "llama.embedding_length": (U32, 32),
        "llama.block_count": (U32, 1),
        "llama.feed_forward_length": (U32, 64),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.head_count_kv": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.dimension_count": (U32, 16),
        "tokenizer.chat_template": (STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
        **vocabulary(n_vocab),
    }


def llama_tensors(seed: int = 0, n_vocab: int = 300) -> list[Tensor]:
    """Return the tensors of a Llama with one layer and random weights."""
    shapes = {
        "token_embd.weight": (32, n_vocab),
        "output_norm.weight": (32,),
        "output.weight": (32, n_vocab),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32),
        "blk.0.attn_v.weight": (32, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (32, 64),
        "blk.0.ffn_up.weight": (32, 64),
        "blk.0.ffn_down.weight": (64, 32),
    }
    draw = random.Random(seed)
    tensors = []
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors.append((name, shape, struct.pack(f"<{count}f", *(draw.uniform(-0.1, 0.1) for _ in range(count)))))
    return tensors


def tiny_model(seed: int = 0) -> bytes:
    """Return a Llama of about 130 kB that llama.cpp loads and runs. `seed` chooses the weights."""
    return gguf(llama_metadata(f"tiny-{seed}"), llama_tensors(seed))


def padded_model(size: int, seed: int = 0) -> bytes:
    """Return a valid GGUF with `size` bytes of noise, for downloads. llama.cpp cannot load it."""
    noise = random.Random(seed).randbytes(size // 4 * 4)
    return gguf({**llama_metadata(f"noise-{seed}", 260)}, [("noise", (len(noise) // 4,), noise)])


def split_model(name: str, count: int, size: int = 10_000) -> dict[str, bytes]:
    """Return the files of a split model by name."""
    files = {}
    for index in range(count):
        split: dict[str, Typed] = {
            "split.no": (U16, index),
            "split.count": (U16, count),
            "split.tensors.count": (I32, count),
        }
        entries = {**llama_metadata(name), **split} if index == 0 else split
        noise = random.Random(index).randbytes(size // 4 * 4)
        files[f"{name}-{index + 1:05d}-of-{count:05d}.gguf"] = gguf(
            entries, [(f"noise.{index}", (len(noise) // 4,), noise)]
        )
    return files


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
