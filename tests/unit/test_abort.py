"""Abort: a decode call is aborted only when every stream in its batch has ended."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from core.engine.native import Abort

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class Stream:
    ended = False


def make() -> tuple[Abort, list[tuple[object, object]]]:
    """Return an Abort and the callbacks that were registered with llama.cpp."""
    callbacks: list[tuple[object, object]] = []
    bindings = SimpleNamespace(
        ggml_abort_callback=CALLBACK,
        llama_set_abort_callback=lambda context, callback, data: callbacks.append((callback, data)),
    )
    return Abort(bindings, None), callbacks


def test_llama_cpp_sees_the_flag() -> None:
    """The C callback returns the value of `raised`."""
    abort, [(callback, data)] = make()
    assert callable(callback)
    stream = Stream()
    abort.begin([stream])

    assert (callback(data), abort.raised) == (False, False)
    stream.ended = True
    abort.look()
    assert (callback(data), abort.raised) == (True, True)


def test_a_batch_is_aborted_when_all_its_streams_have_ended() -> None:
    abort, _ = make()
    first, second = Stream(), Stream()
    abort.begin([first, second])
    first.ended = True
    abort.look()
    assert not abort.raised

    second.ended = True
    abort.look()
    assert abort.raised


def test_a_stream_that_ended_before_begin_aborts_the_batch() -> None:
    abort, _ = make()
    stream = Stream()
    stream.ended = True
    abort.begin([stream])

    assert abort.raised


def test_a_look_after_end_does_not_abort_the_next_batch() -> None:
    """The stream ended while its decode call returned; the next batch belongs to another stream."""
    abort, _ = make()
    late, other = Stream(), Stream()
    abort.begin([late])
    late.ended = True
    abort.end()
    abort.look()
    abort.begin([other])

    assert not abort.raised


def test_a_batch_without_streams_is_aborted_by_stop_only() -> None:
    """The template's prefix belongs to no stream. After `stop` every decode call is aborted."""
    abort, _ = make()
    abort.begin([])
    abort.look()
    assert not abort.raised

    abort.stop()
    assert abort.raised
    abort.end()
    abort.begin([Stream()])
    assert abort.raised
