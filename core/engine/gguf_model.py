"""Load a GGUF file with llama.cpp and describe the model."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from core.engine import native
from core.engine.interface import EngineConfig, ModelCard
from core.errors import InvalidRequest
from core.store.model_file import ModelFile

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Model
    from core.engine.vocabulary import Vocabulary

logger = logging.getLogger("slm.engine")


def load(
    bindings: Bindings, file: ModelFile, config: EngineConfig, progress: Callable[[float], None] | None = None
) -> Model:
    """Load the weights. `progress` is called with the share loaded, 0 to 1.

    Weights that are still being downloaded are mapped but not read. Raises InvalidRequest if llama.cpp cannot load the
    file.
    """
    params = bindings.llama_model_default_params()
    params.n_gpu_layers = config.n_gpu_layers
    params.use_extra_bufts = config.repack and file.arrival is None  # repacking reads the weights at load
    params.load_mode = bindings.LLAMA_LOAD_MODE_MMAP

    def report(share: float, _data: object) -> bool:
        if progress is not None:
            progress(share)
        return True

    callback = bindings.llama_progress_callback(report)
    params.progress_callback = callback
    with native.captured_errors() as reasons:
        model = bindings.llama_model_load_from_file(os.fsencode(file.path), params)
    if not model:
        logger.error("llama.cpp cannot load %s: %s", file.path, "; ".join(reasons) or "no reason given")
        raise InvalidRequest(
            f"llama.cpp cannot load the model '{file.name}': {_reason(reasons)}. "
            "Use a complete GGUF file of an architecture that this llama.cpp supports.",
            param="model_path",
        )
    return model


def describe(bindings: Bindings, model: Model, file: ModelFile, vocabulary: Vocabulary, *, n_ctx: int) -> ModelCard:
    """Return the card of a model in a context of `n_ctx` tokens."""
    details = metadata(bindings, model)
    template = bindings.llama_model_chat_template(model, None)
    description = ctypes.create_string_buffer(256)
    bindings.llama_model_desc(model, description, len(description))
    n_ctx_train = int(bindings.llama_model_n_ctx_train(model))

    def text(token: int) -> str:
        return "" if token < 0 else vocabulary.label(token).decode("utf-8", "replace")

    return ModelCard(
        name=file.name,
        path=str(file.path),
        size_bytes=file.size_bytes,
        description=description.value.decode("utf-8", "replace"),
        architecture=details.get("general.architecture", ""),
        n_params=int(bindings.llama_model_n_params(model)),
        n_vocab=vocabulary.n_tokens,
        n_ctx=min(n_ctx, n_ctx_train) if n_ctx_train > 0 else n_ctx,
        n_ctx_train=n_ctx_train,
        chat_template=None if not template else template.decode("utf-8", "replace"),
        bos=text(vocabulary.bos),
        eos=text(vocabulary.eos),
        metadata={**details, "tokenizer.ggml.add_bos_token": "true" if vocabulary.adds_bos else "false"},
        infill=vocabulary.infill_tokens(),
    )


def metadata(bindings: Bindings, model: Model) -> dict[str, str]:
    """Return the GGUF's metadata as text, without arrays (such as the vocabulary), which begin with "[".

    An array of the sizes to which a Matryoshka model's vectors may be cut is short and kept.
    """
    values = {}
    buffer = ctypes.create_string_buffer(1 << 16)
    for index in range(bindings.llama_model_meta_count(model)):
        bindings.llama_model_meta_key_by_index(model, index, buffer, len(buffer))
        key = buffer.value.decode("utf-8", "replace")
        bindings.llama_model_meta_val_str_by_index(model, index, buffer, len(buffer))
        value = buffer.value.decode("utf-8", "replace")
        if (not value.startswith("[") or "matryoshka" in key) and key != "tokenizer.chat_template":
            values[key] = value
    return values


def _reason(lines: list[str]) -> str:
    """Return our own message for why a load failed. llama.cpp's lines hold paths and are for the log only."""
    text = " ".join(lines)
    for line, reason in (
        ("unknown model architecture", "its architecture is unknown"),
        ("not within the file bounds", "it is truncated"),
        ("corrupted or incomplete", "it is truncated or damaged"),
        ("missing tensor", "tensors are missing"),
        ("vocab", "its vocabulary cannot be read"),
        ("invalid magic", "it is not a GGUF file"),
        ("failed to allocate", "it does not fit in memory"),
    ):
        if line in text:
            return reason
    return "the log has the reason"
