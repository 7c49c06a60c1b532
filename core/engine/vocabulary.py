"""Vocabulary: tokens to bytes, text to tokens, and the tokenizer that grammars need. Knows one model, no context."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

from core.errors import InvalidRequest, ModelUnavailable

GRAMMARS_KEPT = 32  # compiled grammars, most recently used
_SLICE = 1 << 12  # tokens read for grammars under one lock: 5-10 ms
_AT_ONCE = 1 << 14  # tokens read between two looks at `close`: 5-10 ms


class Vocabulary:
    """Thread-safe: llama.cpp's vocabulary is constant once loaded."""

    def __init__(self, bindings: Any, model: Any) -> None:
        self._bindings = bindings
        self._vocab = bindings.llama_model_get_vocab(model)
        self.n_tokens = int(bindings.llama_vocab_n_tokens(self._vocab))
        self.bos = int(bindings.llama_vocab_bos(self._vocab))
        self.eos = int(bindings.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(bindings.llama_vocab_get_add_bos(self._vocab))
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(512)
        self._is_eog: dict[int, bool] = {}
        self._piece_lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._grammar_lock = threading.Lock()
        self._control_lock = threading.Lock()
        self._control: ControlNames | None = None
        self._tokenizer: Any = None
        self._read: list[bytes] = []  # tokens for it, so far
        self._closing = False
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def piece(self, token: int) -> bytes:
        """The bytes a token adds to an answer; nothing for control tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._to_piece(token, special=False)
        return piece

    def label(self, token: int) -> bytes:
        """The bytes by which a token is shown in logprobs: control tokens by their names."""
        return self.piece(token) or self._to_piece(token, special=True)

    def is_end(self, token: int) -> bool:
        """Whether the token ends the answer (end of sequence, of turn, of message)."""
        end = self._is_eog.get(token)
        if end is None:
            end = self._is_eog[token] = bool(self._bindings.llama_vocab_is_eog(self._vocab, token))
        return end

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added. `special`: names of control tokens become those tokens.

        `continued`: the text goes on from another one. Without it a SentencePiece vocabulary such as Llama 2's puts a
        space in front.
        """
        if not text:
            return []
        if not continued or not self._space_prefix:
            return self._tokenize(text, special)
        # llama.cpp has no switch for the space. A line break is a token of its own there: it takes the space and goes.
        tokens = self._tokenize("\n" + text, special)
        count = len(self._space_prefix)
        return tokens[count:] if tokens[:count] == self._space_prefix else self._tokenize(text, special)

    @functools.cached_property
    def _space_prefix(self) -> list[int]:
        """The tokens of a line break if a space goes in front of each text, else nothing."""
        tokens = self._tokenize("\n", False)
        return tokens if b"".join(map(self.piece, tokens)) == b" \n" else []

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # no tokenizer makes more tokens than bytes, but for a space it may put in front
        tokens = (ctypes.c_int32 * room)()
        count = self._bindings.llama_tokenize(self._vocab, data, len(data), tokens, room, False, special)
        if count < 0:
            tokens = (ctypes.c_int32 * -count)()
            count = self._bindings.llama_tokenize(self._vocab, data, len(data), tokens, -count, False, special)
        return tokens[:count]

    def control_names(self) -> ControlNames:
        """The names that tokenizing with `special` turns into tokens. Raises ModelUnavailable after `close`.

        The first call looks at every token: 20 ms for SmolLM2's 49k, 140 for Gemma 3's 262k.
        """
        with self._control_lock:
            if self._control is None:
                self._control = ControlNames(self._read_control_names())
            return self._control

    def _read_control_names(self) -> list[str]:
        bindings = self._bindings
        # A PYFUNCTYPE keeps the interpreter lock: it would be passed to and fro once a token.
        attributes_of = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)(
            ("llama_vocab_get_attr", bindings._lib)
        )
        control = bindings.LLAMA_TOKEN_ATTR_CONTROL | bindings.LLAMA_TOKEN_ATTR_UNKNOWN
        user_defined = bindings.LLAMA_TOKEN_ATTR_USER_DEFINED
        names = []
        for start in range(0, self.n_tokens, _AT_ONCE):
            if self._closing:
                raise ModelUnavailable("The model is being released; try again.", retry_after=1)
            tokens = range(start, min(start + _AT_ONCE, self.n_tokens))
            for token, attributes in zip(tokens, map(attributes_of, repeat(self._vocab), tokens), strict=True):
                if attributes & (control | user_defined):
                    name = bindings.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")
                    if attributes & control or is_markup(name):
                        names.append(name)
        return names

    def matcher(self, grammar: str) -> Any:
        """A fresh llguidance matcher for `grammar`; compiled once, then copied. Raises InvalidRequest if it is refused.

        The first call for a model builds the tokenizer (see `tokenizer`); call it off the event loop.
        """
        with self._grammar_lock:
            compiled = self._matchers.get(grammar)
            if compiled is not None:
                self._matchers.move_to_end(grammar)
                return compiled.deep_copy()
        from llguidance import LLMatcher

        compiled = LLMatcher(self.tokenizer(), grammar, log_level=0)
        if compiled.is_error():
            reason = str(compiled.get_error()).partition("\n")[0][:300]
            raise InvalidRequest(f"The grammar cannot be used: {reason}", param="response_format")
        with self._grammar_lock:
            self._matchers[grammar] = compiled
            while len(self._matchers) > GRAMMARS_KEPT:
                self._matchers.popitem(last=False)
        return compiled.deep_copy()

    def prepare(self, rest: Callable[[], None]) -> None:
        """Build the tokenizer for grammars in small steps, calling `rest` between two without a lock.

        A request that needs the tokenizer meanwhile goes on from where this is. Raises ModelUnavailable after `close`.
        """
        while self._read_on():
            rest()
        self.tokenizer()

    def tokenizer(self) -> Any:
        """llguidance's tokenizer, built at the first call. Raises ModelUnavailable after `close`."""
        while self._read_on():
            pass
        with self._tokenizer_lock:
            self._check_open()
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                tokenize = self._bindings._lib.llama_tokenize
                self._tokenizer = LLTokenizer.from_llamacpp(
                    tokens=self._read,
                    vocab_ptr=self._vocab,
                    tokenize_fptr=ctypes.cast(tokenize, ctypes.c_void_p).value,
                    eos_token=self._ends(),
                    slices=None,
                )
                self._read = []
            return self._tokenizer

    def _check_open(self) -> None:
        if self._closing:
            raise ModelUnavailable("The model is being released; try again.", retry_after=1)

    def close(self) -> None:
        """No more tokens are read. Blocks while the vocabulary that is about to be freed is being read."""
        self._closing = True
        with self._control_lock, self._tokenizer_lock:
            self._tokenizer = None

    def _ends(self) -> list[int]:
        candidates = {self.eos, int(self._bindings.llama_vocab_eot(self._vocab))}
        return sorted(token for token in candidates if token >= 0)

    def _read_on(self) -> bool:
        """Read some more tokens. Returns whether there are others left.

        A token is its bytes, a control token with a leading 0xff as llguidance wants it.
        One buffer for all, and the functions without argument conversion: 262k tokens in a third of the time that
        `llguidance.llamacpp` takes with its two wrapped calls a token.
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
        attributes = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)(("llama_vocab_get_attr", library))
        control, user = self._bindings.LLAMA_TOKEN_ATTR_CONTROL, self._bindings.LLAMA_TOKEN_ATTR_USER_DEFINED
        size = 1 << 16
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        with self._tokenizer_lock:
            self._check_open()
            start = self.n_tokens if self._tokenizer is not None else len(self._read)
            end = min(start + _SLICE, self.n_tokens)
            for token in range(start, end):
                length = to_piece(self._vocab, token, address, size, 0, True)
                piece = ctypes.string_at(address, length) if length > 0 else b""
                kind = attributes(self._vocab, token)
                if kind & control or (kind & user and piece.startswith(b"<") and piece.endswith(b">")):
                    piece = b"\xff" + piece
                self._read.append(piece)
            return end < self.n_tokens

    def _to_piece(self, token: int, *, special: bool) -> bytes:
        with self._piece_lock:
            to_piece = self._bindings.llama_token_to_piece
            length = to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
            if length < 0:
                self._buffer = ctypes.create_string_buffer(-length)
                length = to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
            return ctypes.string_at(self._buffer, length)


# User-defined tokens are markup of a prompt ("<think>", "[TOOL_CALLS]") or ordinary text that a vocabulary holds in one
# piece: runs of white space, words, and in Gemma's the elements of HTML. The latter stay whole, as in training.
_BRACKETED = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_HTML = re.compile(
    r"</?(?:a|b|i|u|em|strong|sub|sup|code|span|div|img|iframe|body|html|footer|ul|ol|li|p|br|blockquote|h[1-6]"
    r"|table|caption|thead|tbody|tfoot|tr|th|td)>"
)


def is_markup(name: str) -> bool:
    """Whether a user-defined token of this name structures prompts, as a control token does."""
    return _BRACKETED.fullmatch(name) is not None and _HTML.fullmatch(name) is None


class ControlNames:
    """The names of a vocabulary's control tokens. Those of one character are left out: they cannot be cut in two."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name for name in names if len(name) > 1)
        lengths: dict[str, set[int]] = {}
        for name in self._names:
            lengths.setdefault(name[:2], set()).add(len(name))
        self._lengths = {pair: tuple(sorted(each)) for pair, each in lengths.items()}
        firsts = "".join(sorted({name[0] for name in self._names}))
        self._first = re.compile(f"[{re.escape(firsts)}]") if firsts else None

    def starts(self, text: str) -> list[int]:
        """Where names begin, in rising order; overlapping ones, too."""
        if self._first is None or len(text) < 2:
            return []
        names, lengths = self._names, self._lengths
        starts = []
        for match in self._first.finditer(text):
            start = match.start()
            for length in lengths.get(text[start : start + 2], ()):
                if text[start : start + length] in names:
                    starts.append(start)
                    break
        return starts
