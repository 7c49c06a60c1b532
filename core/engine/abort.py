"""Abort: stops a decode call that is under way, from another thread."""

from __future__ import annotations

import ctypes
from typing import Any


class Abort:
    """A flag that llama.cpp polls between the nodes of a graph, without Python or its lock.

    llama.cpp wants a C function that takes a pointer and returns whether to stop. libc's strlen is one: over a buffer
    that begins with a zero byte it returns 0, over one that begins with 1 it returns 1. A Python callback would take
    the interpreter lock some hundred times a token.
    """

    def __init__(self, bindings: Any, context: Any) -> None:
        self._flag = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, bindings.ggml_abort_callback)
        self._callback = strlen  # must outlive the context
        bindings.llama_set_abort_callback(context, strlen, ctypes.cast(self._flag, ctypes.c_void_p))

    def set(self) -> None:
        self._flag[0] = b"\x01"

    def clear(self) -> None:
        self._flag[0] = b"\x00"
