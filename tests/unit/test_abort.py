"""Abort: a decode call is stopped only when nobody wants what is in its batch."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from core.engine.native import Abort

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class Stream:
    ended = False


def make() -> tuple[Abort, list[tuple[object, object]]]:
    """An Abort, and what llama.cpp was given to call."""
    set_to: list[tuple[object, object]] = []
    bindings = SimpleNamespace(
        ggml_abort_callback=CALLBACK,
        llama_set_abort_callback=lambda context, callback, data: set_to.append((callback, data)),
    )
    return Abort(bindings, None), set_to


def test_llama_cpp_sees_the_flag() -> None:
    """The C function returns what `raised` says."""
    abort, [(callback, data)] = make()
    assert callable(callback)
    stream = Stream()
    abort.begin([stream])

    assert (callback(data), abort.raised) == (False, False)
    stream.ended = True
    abort.look()
    assert (callback(data), abort.raised) == (True, True)


def test_one_of_several_does_not_stop_the_others() -> None:
    abort, _ = make()
    first, second = Stream(), Stream()
    abort.begin([first, second])
    first.ended = True
    abort.look()
    assert not abort.raised

    second.ended = True
    abort.look()
    assert abort.raised


def test_a_stream_that_had_ended_before_is_seen_at_the_beginning() -> None:
    abort, _ = make()
    stream = Stream()
    stream.ended = True
    abort.begin([stream])

    assert abort.raised


def test_a_late_look_does_not_stop_the_next_decode() -> None:
    """The stream ended while the call that read it returned: the next batch is another's."""
    abort, _ = make()
    late, other = Stream(), Stream()
    abort.begin([late])
    late.ended = True
    abort.end()
    abort.look()
    abort.begin([other])

    assert not abort.raised


def test_a_batch_of_nobodys_is_stopped_by_stop_only() -> None:
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
