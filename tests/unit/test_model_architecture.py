"""Models that cannot generate are refused by the header check and by the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.engine.llama import Llama
from core.errors import InvalidRequest
from core.store import gguf
from core.store.architecture import KINDS, find_kind
from core.store.store import Store


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "is an embedding model (bert); only models that generate text can be served"),
        ("t5", "is an encoder-decoder model (t5); only"),
        ("llada", "is a diffusion model (llada); only"),
    ],
)
def test_the_header_check_refuses_models_that_cannot_generate(
    kind: str, reason: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(gguf.MalformedGGUF) as refused:
        gguf.check_generates(gguf.read_header(tiny(kind)))
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert", "embedding"), ("llama-bidirectional", "embedding"), ("t5", "encoder"), ("llada", "diffusion")],
)
def test_the_engine_refuses_models_that_cannot_generate(
    kind: str, reason: str, tiny_engine: Callable[..., Llama]
) -> None:
    """The engine asks llama.cpp, so it also refuses architectures that are newer than our list."""
    with pytest.raises(InvalidRequest, match=reason) as refused:
        tiny_engine(kind)
    assert refused.value.param == "model_path"


def test_the_header_check_lets_embedding_models_pass_where_they_are_wanted(tiny: Callable[[str], Path]) -> None:
    """A store for embedding models finds one in a file. Other models that cannot generate stay refused."""
    store = Store(tiny("bert").parent, generates=False)

    assert store.locate("bert.gguf") == tiny("bert")
    with pytest.raises(InvalidRequest, match="EMBEDDING_MODEL_PATH serves embedding models"):
        Store(tiny("bert").parent).locate("bert.gguf")
    for kind in ("t5", "llada"):
        with pytest.raises(InvalidRequest, match="only models that generate text"):
            store.locate(tiny(kind).name)


def test_a_model_without_causal_attention_is_refused() -> None:
    assert find_kind({"llama.attention.causal": False}, "llama") is not None
    assert find_kind({"llama.attention.causal": True}, "llama") is None
    assert find_kind({}, "qwen3") is None


def test_llama_cpp_knows_every_listed_architecture() -> None:
    """A misspelt name would refuse nothing. The library contains the names as C strings."""
    from core.engine import native

    library = Path(native.bindings()._lib._name).read_bytes()
    for name in sorted(set().union(*KINDS.values())):
        if len(name) > 3:  # the compiler inlines shorter names
            assert name.encode() + b"\0" in library, name
