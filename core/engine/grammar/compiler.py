"""Compile grammars for one model's vocabulary, with llguidance."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Model

CACHE_SIZE = 32  # compiled grammars, the most recently used
_SLICE = 1 << 12  # tokens read under one lock: 5-10 ms


class Matcher(Protocol):
    """llguidance's state of one sequence: which tokens the grammar allows next."""

    def deep_copy(self) -> Matcher: ...

    def compute_bitmask(self) -> bytes: ...

    def compute_ff_tokens(self) -> list[int]: ...

    def try_consume_tokens(self, tokens: list[int]) -> int: ...

    def is_accepting(self) -> bool: ...

    def is_stopped(self) -> bool: ...

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...


class GrammarCompiler:
    """Holds llguidance's tokenizer and the compiled grammars. Thread-safe."""

    def __init__(self, bindings: Bindings, model: Model) -> None:
        self._bindings = bindings
        self._vocab = bindings.llama_model_get_vocab(model)
        self._n_tokens = int(bindings.llama_vocab_n_tokens(self._vocab))
        self._matchers: OrderedDict[str, Matcher] = OrderedDict()
        self._matchers_lock = threading.Lock()
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._token_bytes: list[bytes] = []  # read for the tokenizer so far
        self._closing = False

    def matcher(self, grammar: str) -> Matcher:
        """Return a fresh llguidance matcher. A grammar is compiled once, then copied. Raises InvalidRequest.

        The first call for a model builds the tokenizer (see `tokenizer`). Call it off the event loop.
        """
        with self._matchers_lock:
            cached = self._matchers.get(grammar)
            if cached is not None:
                self._matchers.move_to_end(grammar)
                return cached.deep_copy()
        from llguidance import LLMatcher

        compiled: Matcher = LLMatcher(self.tokenizer(), grammar, log_level=0)
        if compiled.is_error():
            reason = str(compiled.get_error()).partition("\n")[0][:300]
            raise InvalidRequest(f"The grammar cannot be used: {reason}", param="response_format")
        with self._matchers_lock:
            self._matchers[grammar] = compiled
            while len(self._matchers) > CACHE_SIZE:
                self._matchers.popitem(last=False)
        return compiled.deep_copy()

    def prepare(self, rest: Callable[[], None]) -> None:
        """Build the tokenizer in small steps. Call `rest` between two of them, without holding a lock.

        A request that needs the tokenizer in the meantime continues from there. Raises ModelUnavailable after `close`.
        """
        while self._read_tokens():
            rest()
        self.tokenizer()

    def tokenizer(self) -> Any:
        """Return llguidance's tokenizer. The first call builds it. Raises ModelUnavailable after `close`."""
        while self._read_tokens():
            pass
        with self._tokenizer_lock:
            self._check_open()
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                tokenize = self._bindings._lib.llama_tokenize
                self._tokenizer = LLTokenizer.from_llamacpp(
                    tokens=self._token_bytes,
                    vocab_ptr=self._vocab,
                    tokenize_fptr=ctypes.cast(tokenize, ctypes.c_void_p).value,
                    eos_token=self._end_tokens(),
                    slices=None,
                )
                self._token_bytes = []
            return self._tokenizer

    def close(self) -> None:
        """Stop reading the vocabulary, which is about to be freed. Blocks until it is no longer read."""
        self._closing = True
        with self._tokenizer_lock:
            self._tokenizer = None

    def _check_open(self) -> None:
        if self._closing:
            raise ModelUnavailable("The model is being released. Try again.", retry_after=1)

    def _end_tokens(self) -> list[int]:
        ends = {self._bindings.llama_vocab_eos(self._vocab), self._bindings.llama_vocab_eot(self._vocab)}
        return sorted(int(token) for token in ends if token >= 0)

    def _read_tokens(self) -> bool:
        """Read the bytes of the next tokens. Return whether there are more.

        llguidance wants a leading 0xff for control tokens. One buffer is used for all tokens, and the functions are
        called without argument conversion: 262k tokens take a third of the time of `llguidance.llamacpp`, which makes
        two wrapped calls for each token.
        """
        library = self._bindings._lib
        to_piece = ctypes.CFUNCTYPE(
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_bool,
        )(("llama_token_to_piece", library))
        attributes_of = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)(
            ("llama_vocab_get_attr", library)
        )
        control, user = self._bindings.LLAMA_TOKEN_ATTR_CONTROL, self._bindings.LLAMA_TOKEN_ATTR_USER_DEFINED
        size = 1 << 16
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        with self._tokenizer_lock:
            self._check_open()
            start = self._n_tokens if self._tokenizer is not None else len(self._token_bytes)
            end = min(start + _SLICE, self._n_tokens)
            for token in range(start, end):
                length = to_piece(self._vocab, token, address, size, 0, True)
                piece = ctypes.string_at(address, length) if length > 0 else b""
                attributes = attributes_of(self._vocab, token)
                if attributes & control or (attributes & user and piece.startswith(b"<") and piece.endswith(b">")):
                    piece = b"\xff" + piece
                self._token_bytes.append(piece)
            return end < self._n_tokens
