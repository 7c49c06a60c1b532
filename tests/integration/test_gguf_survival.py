"""Files that pass the header check never crash the real llama.cpp, which runs in processes of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.store import gguf
from tests import gguf_files as files

# Load each file: first only the vocabulary, then the whole model, and decode two tokens.
LOAD = """
import ctypes, sys
import llama_cpp.llama_cpp as llama

@llama.llama_log_callback
def quiet(level, text, data):
    pass

llama.llama_log_set(quiet, ctypes.c_void_p(0))
llama.llama_backend_init()
for path in sys.argv[1:]:
    print(path, flush=True)
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(path.encode(), params)
    if model:
        llama.llama_model_free(model)
    params.vocab_only = False
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        continue
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
    context = llama.llama_init_from_model(model, settings)
    if context:
        llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 2)(1, 5), 2))
        llama.llama_free(context)
    llama.llama_model_free(model)
"""

# Load each file as an embedding model, and embed texts and a pair.
EMBED = """
import logging, pathlib, sys
from core.engine.embedding import LlamaEmbedder
from core.engine.interface import EngineConfig
from core.errors import ApiError
from core.store.model_file import ModelFile

logging.disable(logging.CRITICAL)
for name in sys.argv[1:]:
    print(name, flush=True)
    path = pathlib.Path(name)
    file = ModelFile(path.stem, path, path.stat().st_size, name, "file")
    try:
        engine = LlamaEmbedder(file, EngineConfig(n_ctx=512, n_threads=1))
    except ApiError:
        continue
    texts = [engine.encode("a b, hello!"), engine.encode_pair("a", "b c"), engine.encode("x" * 30)]
    fitting = [text for text in texts if 0 < len(text) <= engine.card.n_ctx]
    try:
        engine.embed(fitting).exception(60)
    except ApiError:
        pass
    engine.close()
"""


def load(paths: list[Path], script: str = LOAD) -> tuple[int, str]:
    """Load files in a process. Return its exit status and the last file that it began."""
    # Without GGML_NO_BACKTRACE an assertion starts a debugger, which takes seconds.
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        timeout=120,
    )
    return result.returncode, result.stdout.split()[-1] if result.stdout else ""


def survivors(content: bytes, count: int, seed: int) -> list[bytes]:
    """Return models with flipped header bits that pass the check. Half of the flips may be in the vocabulary."""
    draw = random.Random(seed)
    end = gguf.parse_header(lambda at, length: content[at : at + length], len(content)).data_offset
    vocabulary = content.index(b"tokenizer.ggml.tokens")
    passed: list[bytes] = []
    while len(passed) < count:
        mutant = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            at = draw.randrange(end if draw.random() < 0.5 else vocabulary)
            mutant[at] ^= 1 << draw.randrange(8)
        try:
            gguf.parse_header(lambda at, length, content=bytes(mutant): content[at : at + length], len(mutant))
        except gguf.MalformedGGUF:
            continue
        passed.append(bytes(mutant))
    return passed


def test_files_that_pass_the_check_do_not_crash_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp refuses or runs each of a thousand models with flipped bits."""
    paths = [
        files.write(tmp_path, f"{index}.gguf", each)
        for index, each in enumerate(survivors(files.tiny_model(), 1000, seed=7))
    ]
    for begin in range(0, len(paths), 250):
        status, last = load(paths[begin : begin + 250])

        assert status == 0, f"{last} ended the process ({status}): {survivor_diff(Path(last))}"


@pytest.mark.parametrize("kind", ["bert", "bert-rank"])
def test_embedding_models_that_pass_the_check_do_not_crash_llama_cpp(
    kind: str, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    """The engine refuses or runs each of a hundred encoders with flipped bits."""
    content = tiny(kind).read_bytes()
    paths = [files.write(tmp_path, f"{index}.gguf", each) for index, each in enumerate(survivors(content, 100, seed=7))]

    status, last = load(paths, EMBED)

    assert (status, last) == (0, str(paths[-1]))


def test_a_file_that_the_check_refuses_crashes_llama_cpp(tmp_path: Path) -> None:
    """This is the control: a duplicate token, which the check refuses, fails an assertion in llama.cpp."""
    entries = files.llama_metadata()
    kind, element, tokens = entries["tokenizer.ggml.tokens"]
    entries["tokenizer.ggml.tokens"] = (kind, element, [*tokens[:-1], tokens[0]])
    path = files.write(tmp_path, "duplicate.gguf", files.gguf(entries, files.llama_tensors()))
    status, last = load([path])

    assert (status, last) == (-6, str(path))


def survivor_diff(path: Path) -> dict[str, object]:
    """Return the metadata in which a mutant differs from the original model."""
    content = files.tiny_model()
    before = gguf.parse_header(lambda at, length: content[at : at + length], len(content)).metadata
    after = gguf.read_header(path).metadata
    return {key: after.get(key) for key in {*before, *after} if before.get(key) != after.get(key)}
