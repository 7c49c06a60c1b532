"""Abort: stops a decode call that is under way, from another thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from typing import Any, Protocol


class Ending(Protocol):
    """A stream; `ended` turns true once, when nobody wants more of it."""

    @property
    def ended(self) -> bool: ...


class Abort:
    """A flag that llama.cpp polls between the nodes of a graph, without Python or its lock.

    llama.cpp wants a C function that takes a pointer and returns whether to stop. libc's strlen is one: over a buffer
    that begins with a zero byte it returns 0, over one that begins with 1 it returns 1. A Python callback would take
    the interpreter lock some hundred times a token.

    A decode call is aborted only when all streams in its batch have ended. To abort it for one of them would throw the
    others' work away, and where the state of a sequence cannot be cut back (recurrent and hybrid models) all they have
    read.
    """

    def __init__(self, bindings: Any, context: Any) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._lock = threading.Lock()
        self._streams: tuple[Ending, ...] = ()  # of the decode call under way
        self._stopped = False
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, bindings.ggml_abort_callback)
        self._callback = strlen  # must outlive the context
        bindings.llama_set_abort_callback(context, strlen, ctypes.cast(self._flag, ctypes.c_void_p))

    @property
    def raised(self) -> bool:
        """Whether a decode call that is under way stops."""
        return self._flag[0] != b"\x00"

    def begin(self, streams: Iterable[Ending]) -> None:
        """A decode call begins, for `streams`. None of them: only `stop` aborts it."""
        with self._lock:
            self._streams = tuple(streams)
            self._look()

    def end(self) -> None:
        """The decode call has returned: what ends from now on does not touch the next one."""
        with self._lock:
            self._streams = ()
            self._look()

    def look(self) -> None:
        """A stream has ended. From any thread."""
        with self._lock:
            self._look()

    def stop(self) -> None:
        """Abort this decode call and all later ones. From any thread."""
        with self._lock:
            self._stopped = True
            self._look()

    def _look(self) -> None:
        raised = self._stopped or (bool(self._streams) and all(stream.ended for stream in self._streams))
        self._flag[0] = b"\x01" if raised else b"\x00"
