"""llama.cpp as a C library: load it, collect its errors, and hold the memory that a decode call reads.

Only this module imports llama_cpp, once and cheaply. `Batch` and `Abort` are what a decode call reads: its tokens, and
the flag that stops it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.engine.variants import best, cpu_flags

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context

logger = logging.getLogger("slm.llama")

SPIN_COUNT = "1000"
LOG_LEVEL_ERROR = 4  # ggml.h's GGML_LOG_LEVEL_ERROR; the bindings have no name for it

MOST_CAPTURED = 20  # lines

_lock = threading.Lock()
_bindings: Bindings | None = None
_log_callback: Any = None  # ctypes callbacks must outlive every call into the library
_verbose = False


class _Capture(threading.local):
    """One list for each thread: one may load a model while another decodes."""

    lines: list[str] | None = None


_capture = _Capture()


def bindings() -> Bindings:
    """Return `llama_cpp.llama_cpp`. The first call imports it and loads its backends. Thread-safe.

    The package's own `__init__` imports numpy, jinja2 and diskcache for the high-level class, which is not used here:
    0.75 s and 44 MB. With an empty package in its place the import takes 0.12 s and 23 MB (llama-cpp-python 0.3.36;
    tested in tests/conventions).
    """
    global _bindings
    with _lock:
        if _bindings is None:
            # 1) ggml's threads meet at an OpenMP barrier after each node of the graph. By default libgomp's threads
            # spin there for about a millisecond before they sleep. If another process has the CPU that one of them
            # needs (another container, a quota, the event loop), a token takes a second and more. Measured with 2
            # threads on 2 CPUs, in ms a token, idle / with 14 busy processes: default 11 / 1200-2500, 3000: 10 / 210,
            # 1000: 10 / 130, 300: 12 / 80, 0: 20 / 55. libgomp reads the variable when it is loaded.
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
            # 2) An empty package in place of llama_cpp's `__init__`.
            if "llama_cpp" not in sys.modules:
                spec = importlib.util.find_spec("llama_cpp")
                if spec is None or spec.submodule_search_locations is None:
                    raise ModuleNotFoundError("llama-cpp-python is not installed; `make install` installs it")
                package = types.ModuleType("llama_cpp")
                package.__path__ = list(spec.submodule_search_locations)
                package.__spec__ = spec
                sys.modules["llama_cpp"] = package
            # 3) The functions, their log and their backends.
            module: Any = importlib.import_module("llama_cpp.llama_cpp")
            _route_log(module)
            _load_backends(module)
            module.llama_backend_init()
            _bindings = module
    return _bindings


def _load_backends(module: types.ModuleType) -> None:
    """Load the CPU backend of a `GGML_BACKEND_DL` build: the best variant for this CPU.

    If it is certain which variant that is, only that one is opened. Otherwise ggml opens all of them and chooses. The
    variants are in site-packages/bin, or next to libllama. The call must go to the libggml that libllama has loaded:
    its registry is a static variable, and a copy under another name (libggml.so instead of libggml.so.0) has its own.
    An ordinary build has its backend linked in, so there is nothing to load.
    """
    package = Path(str(module.__file__)).parent
    folders = (package / "lib", package.parent / "bin", package.parent / "lib")
    variants = next((folder for folder in folders if any(folder.glob("libggml-cpu-*.so"))), None)
    if variants is None:
        return
    loaded = _mapped_library("libggml.so")
    if loaded is None:
        raise RuntimeError(f"libggml is not loaded; cannot load the backends in {variants}")
    ggml = ctypes.CDLL(loaded)
    if not _load_best(ggml, variants):
        load_all = ggml.ggml_backend_load_all_from_path
        load_all.argtypes, load_all.restype = [ctypes.c_char_p], None
        load_all(os.fsencode(variants))


def _load_best(ggml: Any, folder: Path) -> bool:
    """Open the best variant for this CPU. Return False if that is not certain, or ggml cannot open it."""
    files = sorted(path.name for path in folder.glob("libggml-*.so"))
    others = {"libggml-base.so", "libggml-cpu.so"}
    variants = [name for name in files if name not in others]
    if not all(name.startswith("libggml-cpu-") for name in variants):
        return False  # there are other backends (CUDA, Vulkan), which ggml must find
    try:
        flags = cpu_flags(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False
    name = best(variants, flags)
    if name is None:
        return False
    load = ggml.ggml_backend_load
    load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
    return load(os.fsencode(folder / name)) is not None


def _mapped_library(name: str) -> str | None:
    """Return the path of a library that is mapped into this process and whose file name starts with `name`."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if path.rpartition("/")[2].startswith(name):
                return "/" + path
    return None


def _route_log(module: Bindings) -> None:
    """Send llama.cpp's log lines to `logging`: errors as errors, unless `captured_errors` collects them."""
    global _log_callback

    def write(level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if not line:
            return
        lines = _capture.lines
        if level == LOG_LEVEL_ERROR and lines is not None and len(lines) < MOST_CAPTURED:
            lines.append(line)
        if level == LOG_LEVEL_ERROR and lines is None:
            logger.error("%s", line)
        else:
            logger.log(logging.INFO if _verbose else logging.DEBUG, "%s", line)

    _log_callback = module.llama_log_callback(write)
    module.llama_log_set(_log_callback, ctypes.c_void_p(0))


def set_verbose(verbose: bool) -> None:
    """Log llama.cpp's own lines at level info instead of debug."""
    global _verbose
    _verbose = verbose


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp writes in this thread. For the log only: they contain paths."""
    outer, _capture.lines = _capture.lines, []
    try:
        yield _capture.lines
    finally:
        _capture.lines = outer


class Batch:
    """The tokens of one decode call, of several slots, in arrays that llama.cpp reads. It holds `size`, and is reused.

    Whole slices are assigned, which ctypes does in C. Filling `llama_batch` element by element costs about 0.4 us a
    token.
    """

    def __init__(self, bindings: Bindings, size: int, n_slots: int) -> None:
        self.size = size
        self.length = 0
        self._tokens: Any = (ctypes.c_int32 * size)()
        self._positions: Any = (ctypes.c_int32 * size)()
        self._counts = (ctypes.c_int32 * size)(*[1] * size)
        self._logits: Any = (ctypes.c_int8 * size)()
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slot_ids = [(ctypes.c_int32 * 1)(slot) for slot in range(n_slots)]
        self._slot_pointers = [ctypes.cast(slot_id, pointer) for slot_id in self._slot_ids]
        self._slots: Any = (pointer * size)()
        self.native = bindings.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._slots,
            logits=self._logits,
        )

    def clear(self) -> None:
        self.length = 0

    def add(self, slot: int, tokens: list[int], position: int, *, logits: bool, every: bool = False) -> int:
        """Append `tokens` of `slot` from `position` on. With `logits`, compute those of the last token, or of `every`.

        Returns the last token's index in the batch, which is where its logits are after the decode.
        """
        start, end = self.length, self.length + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = range(position, position + len(tokens))
        self._slots[start:end] = [self._slot_pointers[slot]] * len(tokens)
        self._logits[start:end] = (b"\x01" if every else b"\x00") * len(tokens)
        if logits:
            self._logits[end - 1] = 1
        self.length = self.native.n_tokens = end
        return end - 1


class Ending(Protocol):
    """A stream. `ended` becomes True once, when the stream needs no more deltas."""

    @property
    def ended(self) -> bool: ...


class Abort:
    """Aborts the current decode call: a flag that llama.cpp polls between the nodes of a graph.

    llama.cpp takes a C function that gets a pointer and returns whether to stop. libc's strlen is such a function: for
    a buffer that begins with a zero byte it returns 0, for one that begins with 1 and a zero byte it returns 1. A
    Python callback would take the interpreter lock hundreds of times a token.

    A decode call is aborted only when all streams in its batch have ended. Aborting it for one of them would discard
    the others' work. With recurrent and hybrid models it would even discard their whole prefill, because their state
    cannot be truncated.
    """

    def __init__(self, bindings: Bindings, context: Context) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._lock = threading.Lock()
        self._streams: tuple[Ending, ...] = ()  # of the current decode call
        self._stopped = False
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, bindings.ggml_abort_callback)
        self._callback = strlen  # must outlive the context
        bindings.llama_set_abort_callback(context, strlen, ctypes.cast(self._flag, ctypes.c_void_p))

    @property
    def raised(self) -> bool:
        """Whether llama.cpp should stop the current decode call."""
        return self._flag[0] != b"\x00"

    def begin(self, streams: Iterable[Ending]) -> None:
        """Begin a decode call for `streams`. Without streams only `stop` aborts it."""
        with self._lock:
            self._streams = tuple(streams)
            self._look()

    def end(self) -> None:
        """End the decode call. A stream that ends from now on does not abort the next one."""
        with self._lock:
            self._streams = ()
            self._look()

    def look(self) -> None:
        """Check the streams, after one of them has ended. Any thread may call this."""
        with self._lock:
            self._look()

    def stop(self) -> None:
        """Abort this decode call and all later ones. Any thread may call this."""
        with self._lock:
            self._stopped = True
            self._look()

    def _look(self) -> None:
        raised = self._stopped or (bool(self._streams) and all(stream.ended for stream in self._streams))
        self._flag[0] = b"\x01" if raised else b"\x00"


def trim_heap() -> None:
    """Return freed memory to the operating system, where the C library is glibc.

    An engine's threads allocate in arenas of their own, and glibc keeps what is freed there: after 14 reloads of a
    100 MB model a process held 321 MiB, against 210 MiB with a single arena.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
