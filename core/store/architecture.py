"""Recognise models that llama.cpp loads but that cannot generate text. Some of them embed texts.

Generating with one of them ends the process: llama.cpp's decode asserts on a model without a memory of tokens, and on a
decoder whose encoder has not run (llama-context.cpp and llama-graph.cpp of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BIDIRECTIONAL = "a model whose tokens see the tokens behind them, as those of embedding models do"

KINDS: Mapping[str, frozenset[str]] = {
    "an embedding model": frozenset(
        {"bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert", "jina-bert-v2", "jina-bert-v3"}
        | {"gemma-embedding", "llama-embed"}
    ),
    "an encoder-decoder model": frozenset({"t5", "t5encoder"}),
    "a diffusion model": frozenset({"dream", "llada", "llada-moe", "rnd1"}),
    "an audio decoder": frozenset({"wavtokenizer-dec"}),
}


def find_kind(metadata: Mapping[str, Any], architecture: str) -> str | None:
    """Return the kind of a model that cannot generate text, such as "an embedding model", or None."""
    for kind, architectures in KINDS.items():
        if architecture in architectures:
            return kind
    if metadata.get(f"{architecture}.attention.causal") is False:
        return BIDIRECTIONAL
    return None


def may_embed(kind: str) -> bool:
    """Return whether a model of this kind, which cannot generate, can be an embedding model."""
    return kind in ("an embedding model", BIDIRECTIONAL)
