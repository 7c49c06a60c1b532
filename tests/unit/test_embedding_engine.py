"""The embedding engine over tiny models: batches, slices, pooling, reranking, cancelling and closing."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.engine.embedding import MOST_TEXTS, Job, LlamaEmbedder, encode_pair, fill, slices
from core.engine.interface import EngineConfig, Vector
from core.errors import Busy, InvalidRequest, ModelUnavailable
from core.store.model_file import ModelFile

TEXTS = ["a", "some longer text, with signs!", "Ab cD", "z" * 40, "a"]


class Arrival:
    """Weights that arrive when the test says so."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    def wait(self) -> None:
        assert self.arrived.wait(30)

    def progress(self) -> tuple[int, int]:
        return 0, 1

    def cancel(self) -> None:
        self.arrived.set()


@pytest.fixture
def load(tiny: Callable[[str], Path]) -> Iterator[Callable[..., LlamaEmbedder]]:
    """Load a tiny model, e.g. `load("bert", n_ctx=64)`. It is closed when the test ends."""
    engines: list[LlamaEmbedder] = []

    def load(kind: str, arrival: Arrival | None = None, **config: Any) -> LlamaEmbedder:
        path = tiny(kind)
        file = ModelFile(path.stem, path, path.stat().st_size, "file")
        file = replace(file, arrival=arrival)
        engines.append(LlamaEmbedder(file, EngineConfig(**{"n_ctx": 1024, "n_threads": 1, **config})))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def embed(engine: LlamaEmbedder, *texts: str) -> list[Vector]:
    return engine.embed([engine.encode(text) for text in texts]).result(30)


def cosine(one: Vector, other: Vector) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("llama-bidirectional", "mean"), ("bert-cls", "cls"), ("llama-last", "last"), ("llama", "none")],
)
def test_the_pooling_is_the_models_own(kind: str, pooling: str, load: Callable[..., LlamaEmbedder]) -> None:
    engine = load(kind)

    assert engine.pooling == pooling
    assert engine.n_dimensions == 32


@pytest.mark.parametrize("kind", ["bert", "bert-cls", "llama-bidirectional", "llama-last"])
def test_texts_of_one_batch_do_not_see_each_other(kind: str, load: Callable[..., LlamaEmbedder]) -> None:
    """Each text has the vector that it has alone."""
    engine = load(kind)

    together = embed(engine, *TEXTS)

    assert engine.stats()["decode_calls"] == 1
    for text, vector in zip(TEXTS, together, strict=True):
        assert len(vector) == 32
        assert cosine(vector, embed(engine, text)[0]) > 0.99999
    assert cosine(together[0], together[4]) > 0.99999
    assert cosine(together[0], together[1]) < 0.99


def test_a_causal_model_reads_a_long_text_in_slices(load: Callable[..., LlamaEmbedder]) -> None:
    """A batch of 64 tokens gives the same vectors as one that holds all texts."""
    texts = ["x" * 300, "short", "y" * 100]
    whole, sliced = load("llama-last", n_batch=512), load("llama-last", n_batch=16)

    expected, vectors = embed(whole, *texts), embed(sliced, *texts)

    assert whole.stats()["decode_calls"] == 2
    assert sliced.stats()["decode_calls"] == 7
    assert all(cosine(*pair) > 0.9999 for pair in zip(expected, vectors, strict=True))


def test_a_small_context_bounds_what_is_packed(load: Callable[..., LlamaEmbedder]) -> None:
    """The KV cells hold 256 tokens, so 20 texts of 42 tokens take several batches."""
    engine = load("llama-last", n_ctx=64)

    assert len(embed(engine, *["x" * 40] * 20)) == 20
    assert engine.stats()["decode_calls"] > 2


def test_an_unknown_pooling_type_is_refused(tmp_path: Path, load: Callable[..., LlamaEmbedder]) -> None:
    """llama.cpp would end the process."""
    from tests import tiny_models

    path = tmp_path / "strange.gguf"
    tiny_models.bert(path, pooling=SimpleNamespace(value=9))  # type: ignore[arg-type]

    with pytest.raises(InvalidRequest, match="unknown pooling type 9"):
        LlamaEmbedder(ModelFile("strange", path, path.stat().st_size, str(path), "file"), EngineConfig(n_threads=1))


def test_korean_is_decomposed_in_linear_time(load: Callable[..., LlamaEmbedder]) -> None:
    """A million combining marks, which `unicodedata` would sort for minutes, pass."""
    engine = load("bert")

    assert engine._decomposed("a각b\u0301\u0316") == "a\u1100\u1161\u11a8b\u0301\u0316"
    assert engine.encode("a" + "\u0301\u0316" * 500_000)[:2] == engine.encode("a")[:2]
    assert load("llama-last")._decomposed("각") == "각"


def test_an_encoder_has_room_for_its_longest_text(load: Callable[..., LlamaEmbedder]) -> None:
    """N_BATCH does not cut a text that the encoder must see as a whole, and N_CTX bounds it."""
    engine = load("bert", n_batch=8)
    assert engine.card.n_ctx == 256  # of the model

    [vector] = engine.embed([[2, *[7] * 254, 3]]).result(30)

    assert len(vector) == 32
    assert engine.stats()["decode_calls"] == 1
    assert load("bert", n_ctx=64).card.n_ctx == 64


def test_special_tokens_are_added_as_the_vocabulary_says(load: Callable[..., LlamaEmbedder]) -> None:
    assert load("bert").encode("a")[0::2] == [2, 3]  # [CLS] and [SEP]
    assert load("llama-last").encode("a")[0::2] == [1, 2]  # BOS and EOS
    assert load("llama").encode("a")[0] == 1
    assert load("llama").encode("a")[-1] != 2


def test_control_tokens_in_a_text_are_text(load: Callable[..., LlamaEmbedder]) -> None:
    assert 2 not in load("llama-last").encode("</s></s>")[:-1]


def test_a_reranker_scores_pairs(load: Callable[..., LlamaEmbedder]) -> None:
    """A pair is [CLS] query [SEP] document [SEP]; its one number differs between documents."""
    engine = load("bert-rank")
    pairs = [engine.encode_pair("a", text) for text in ("b", "c d")]

    scores = engine.embed(pairs).result(30)

    assert (engine.pooling, engine.n_dimensions, engine.probabilities) == ("rank", 1, False)
    assert [pair.count(3) for pair in pairs] == [2, 2]
    assert (pairs[0][0], pairs[0][2], pairs[0][-1]) == (2, 3, 3)
    assert [len(score) for score in scores] == [1, 1]
    assert scores[0] != scores[1]


def test_a_models_own_template_joins_query_and_document(load: Callable[..., LlamaEmbedder]) -> None:
    """Control tokens come from the template only, not from the texts."""
    vocabulary = load("llama-last")._vocabulary

    tokens = encode_pair(vocabulary, "a</s>", "b{query}", "<s>q:{query}</s>d:{document}</s>")

    text = b"".join(vocabulary.label(token) for token in tokens)
    assert text == b"<s>q:a</s></s>d:b{query}</s>"
    assert (tokens.count(1), tokens.count(2)) == (1, 2)


@pytest.mark.parametrize("kind", ["t5", "llada"])
def test_other_kinds_of_models_are_refused(kind: str, load: Callable[..., LlamaEmbedder]) -> None:
    with pytest.raises(InvalidRequest, match="makes no embeddings"):
        load(kind)


def test_a_cancelled_request_leaves_the_others_alone(load: Callable[..., LlamaEmbedder]) -> None:
    arrival = Arrival()
    engine = load("bert", arrival)
    dropped = engine.embed([engine.encode("a")])
    kept = engine.embed([engine.encode("b")])

    assert dropped.cancel()
    arrival.arrived.set()

    assert len(kept.result(30)) == 1
    with pytest.raises(CancelledError):
        dropped.result(0)
    assert engine.stats()["texts"] == 1
    assert engine.stats()["queued"] == 0


def test_a_full_queue_is_a_429(load: Callable[..., LlamaEmbedder]) -> None:
    arrival = Arrival()
    engine = load("bert", arrival, max_queue=1)
    for _ in range(2):
        engine.embed([[2, 7, 3]])

    with pytest.raises(Busy, match="queue"):
        engine.embed([[2, 7, 3]])
    arrival.arrived.set()


def test_a_closed_engine_fails_what_waits(load: Callable[..., LlamaEmbedder]) -> None:
    arrival = Arrival()
    engine = load("bert", arrival)
    waiting = engine.embed([[2, 7, 3]])

    engine.close()

    with pytest.raises(ModelUnavailable, match="released"):
        waiting.result(30)
    with pytest.raises(ModelUnavailable, match="released"):
        engine.embed([[2, 7, 3]])


def test_an_engine_that_fails_says_so(load: Callable[..., LlamaEmbedder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The request gets a 503, and the host sees that the engine must be loaded again."""
    engine = load("bert")
    monkeypatch.setattr(engine, "_compute", lambda _members: 1 / 0)

    with pytest.raises(ModelUnavailable, match="failed"):
        engine.embed([[2, 7, 3]]).result(30)
    assert engine.failed is not None
    with pytest.raises(ModelUnavailable, match="failed"):
        engine.embed([[2, 7, 3]])


def test_a_batch_takes_texts_in_turn() -> None:
    """A short request does not wait until a long one is done."""
    long, short = Job([[1] * 10] * 100), Job([[1] * 10])

    members = fill(deque([long, short]), 45)

    assert [(member.job is short, member.place) for member in members] == [
        (False, 0),
        (True, 0),
        (False, 1),
        (False, 2),
    ]


def test_a_text_longer_than_a_batch_goes_alone() -> None:
    jobs = deque([Job([[1] * 100]), Job([[1]])])

    assert len(fill(jobs, 45)) == 1
    assert len(fill(jobs, 45)) == 1
    assert not jobs


def test_a_batch_holds_a_bounded_number_of_texts() -> None:
    jobs = deque([Job([[1]] * 1000)])

    assert len(fill(jobs, 512)) == MOST_TEXTS
    assert jobs[0].taken == MOST_TEXTS


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
def test_slices_cover_each_token_once(most: int) -> None:
    lengths = [5, 1, 9, 2]
    pieces = list(slices(lengths, most))

    assert all(sum(part.end - part.start for part in piece) == most for piece in pieces[:-1])
    covered = [(part.slot, token) for piece in pieces for part in piece for token in range(part.start, part.end)]
    assert covered == [(slot, token) for slot, length in enumerate(lengths) for token in range(length)]
