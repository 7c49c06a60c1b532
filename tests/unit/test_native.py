"""Native: llama.cpp's log lines and bindings."""

from __future__ import annotations

import logging
import threading

import pytest

from core.engine import native


def load(path: str) -> None:
    """Make llama.cpp log errors that name `path`, in this thread."""
    bindings = native.bindings()
    assert not bindings.llama_model_load_from_file(path.encode(), bindings.llama_model_default_params())


def test_errors_are_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    load("/nowhere/a.gguf")

    assert any("/nowhere/a.gguf" in line.getMessage() for line in caplog.records if line.levelno == logging.ERROR)


def test_a_capture_holds_errors_of_its_own_thread_only(caplog: pytest.LogCaptureFixture) -> None:
    """Errors of other threads, such as a serving engine's, are logged instead."""
    with native.captured_errors() as lines:
        other = threading.Thread(target=load, args=("/nowhere/other.gguf",))
        other.start()
        other.join()
        load("/nowhere/mine.gguf")

    assert any("/nowhere/mine.gguf" in line for line in lines)
    assert not any("other" in line for line in lines)
    errors = " ".join(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "/nowhere/other.gguf" in errors
    assert "mine" not in errors


def test_after_a_capture_errors_are_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    with native.captured_errors() as lines:
        pass
    load("/nowhere/a.gguf")

    assert not lines
    assert "/nowhere/a.gguf" in caplog.text


def test_the_bindings_match_their_type() -> None:
    """`Bindings` is written by hand. Its functions and fields must exist in llama_cpp."""
    from core.engine.bindings import Bindings, ContextParams, ModelParams

    module = native.bindings()
    functions = {name for name in vars(Bindings) if name.startswith(("llama_", "ggml_"))}
    names = functions | Bindings.__annotations__.keys()
    assert len(names) > 50
    assert [name for name in sorted(names) if not hasattr(module, name)] == []
    for params, structure in (
        (ModelParams, module.llama_model_default_params()),
        (ContextParams, module.llama_context_default_params()),
    ):
        assert [name for name in params.__annotations__ if not hasattr(structure, name)] == []
