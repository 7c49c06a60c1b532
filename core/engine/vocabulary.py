"""Convert text to tokens and tokens to bytes, and find the names of control tokens in a text."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Collection, Iterable
from itertools import repeat
from typing import TYPE_CHECKING

from core.engine.interface import InfillTokens
from core.errors import ModelUnavailable

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Model

_AT_ONCE = 1 << 14  # tokens read between two checks for `close`: 5-10 ms

# User-defined tokens are either markup of a prompt ("<think>", "[TOOL_CALLS]") or ordinary text that the vocabulary has
# as one token: runs of white space, words, and HTML elements in Gemma's. The latter stay whole, as in training.
_BRACKETED = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_HTML = re.compile(
    r"</?(?:a|b|i|u|em|strong|sub|sup|code|span|div|img|iframe|body|html|footer|ul|ol|li|p|br|blockquote|h[1-6]"
    r"|table|caption|thead|tbody|tfoot|tr|th|td)>"
)


class Vocabulary:
    """The vocabulary of one model. Thread-safe: it does not change after the load."""

    def __init__(self, bindings: Bindings, model: Model) -> None:
        self._bindings = bindings
        self._vocab = bindings.llama_model_get_vocab(model)
        self.n_tokens = int(bindings.llama_vocab_n_tokens(self._vocab))
        self.bos = int(bindings.llama_vocab_bos(self._vocab))
        self.eos = int(bindings.llama_vocab_eos(self._vocab))
        self.sep = int(bindings.llama_vocab_sep(self._vocab))
        self.adds_bos = bool(bindings.llama_vocab_get_add_bos(self._vocab))
        self.adds_eos = bool(bindings.llama_vocab_get_add_eos(self._vocab))
        self.adds_sep = bool(bindings.llama_vocab_get_add_sep(self._vocab))
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(512)
        self._is_end: dict[int, bool] = {}
        self._piece_lock = threading.Lock()
        self._control_lock = threading.Lock()
        self._control: ControlNames | None = None
        self._closing = False

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token adds to an answer: none for a control token."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._to_piece(token, special=False)
        return piece

    def label(self, token: int) -> bytes:
        """Return the bytes that show a token in logprobs: the name of a control token, else its piece."""
        return self.piece(token) or self._to_piece(token, special=True)

    def pieces(self, tokens: Collection[int], *, special: bool) -> list[bytes]:
        """Return the bytes of each token. A control token shows as its name with `special`, and is empty without.

        Joined they are the text. The space that a vocabulary such as Llama 2's puts in front of it is left out.
        """
        pieces = [self.label(token) if special else self.piece(token) for token in tokens]
        if self._space_prefix:
            first = next((index for index, token in enumerate(tokens) if self.piece(token)), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return pieces

    def infill_tokens(self) -> InfillTokens | None:
        """Return the control tokens of fill-in-the-middle prompts, if the vocabulary has the three that they need."""
        names = ("pre", "suf", "mid", "rep", "sep")
        prefix, suffix, middle, *others = (
            int(getattr(self._bindings, f"llama_vocab_fim_{name}")(self._vocab)) for name in names
        )
        if min(prefix, suffix, middle) < 0:
            return None
        return InfillTokens(prefix, suffix, middle, *(None if token < 0 else token for token in others))

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer (end of sequence, of turn, of message)."""
        end = self._is_end.get(token)
        if end is None:
            end = self._is_end[token] = bool(self._bindings.llama_vocab_is_eog(self._vocab, token))
        return end

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        """Return the token ids of `text`, without BOS. With `special`, names of control tokens become those tokens.

        A SentencePiece vocabulary such as Llama 2's puts a space in front of each text. With `continued`, the text
        follows another one and gets no space.
        """
        if not text:
            return []
        if not continued or not self._space_prefix:
            return self._tokenize(text, special)
        # llama.cpp cannot turn the space off. A line break is a token of its own there: put one in front of the text
        # and remove it from the tokens, together with its space.
        tokens = self._tokenize("\n" + text, special)
        count = len(self._space_prefix)
        return tokens[count:] if tokens[:count] == self._space_prefix else self._tokenize(text, special)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a whole text, with the BOS, EOS and separator tokens that the vocabulary adds."""
        return self._tokenize(text, special=False, add_special=True)

    def control_names(self) -> ControlNames:
        """Return the names that tokenizing with `special` turns into tokens. Raises ModelUnavailable after `close`.

        The first call reads every token: 20 ms for SmolLM2's 49k, 140 ms for Gemma 3's 262k.
        """
        with self._control_lock:
            if self._control is None:
                self._control = ControlNames(self._read_control_names())
            return self._control

    def close(self) -> None:
        """Stop reading the vocabulary, which is about to be freed. Blocks until it is no longer read."""
        self._closing = True
        with self._control_lock:
            return

    @functools.cached_property
    def _space_prefix(self) -> list[int]:
        """Return the tokens of a line break if the vocabulary puts a space in front of each text, else none."""
        tokens = self._tokenize("\n", False)
        return tokens if b"".join(map(self.piece, tokens)) == b" \n" else []

    def _tokenize(self, text: str, special: bool, *, add_special: bool = False) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # no tokenizer makes more tokens than bytes, except for special ones and a space in front
        tokens = (ctypes.c_int32 * room)()
        tokenize = self._bindings.llama_tokenize
        count = tokenize(self._vocab, data, len(data), tokens, room, add_special, special)
        if count < 0:
            tokens = (ctypes.c_int32 * -count)()
            count = tokenize(self._vocab, data, len(data), tokens, -count, add_special, special)
        return tokens[:count]

    def _to_piece(self, token: int, *, special: bool) -> bytes:
        with self._piece_lock:
            to_piece = self._bindings.llama_token_to_piece
            length = to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
            if length < 0:
                self._buffer = ctypes.create_string_buffer(-length)
                length = to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
            return ctypes.string_at(self._buffer, length)

    def _read_control_names(self) -> list[str]:
        bindings = self._bindings
        # A PYFUNCTYPE keeps the interpreter lock, which would otherwise be released and taken again for each token.
        attributes_of = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)(
            ("llama_vocab_get_attr", bindings._lib)
        )
        control = bindings.LLAMA_TOKEN_ATTR_CONTROL | bindings.LLAMA_TOKEN_ATTR_UNKNOWN
        user_defined = bindings.LLAMA_TOKEN_ATTR_USER_DEFINED
        names = []
        for start in range(0, self.n_tokens, _AT_ONCE):
            if self._closing:
                raise ModelUnavailable("The model is being released. Try again.", retry_after=1)
            tokens = range(start, min(start + _AT_ONCE, self.n_tokens))
            for token, attributes in zip(tokens, map(attributes_of, repeat(self._vocab), tokens), strict=True):
                if attributes & (control | user_defined):
                    name = bindings.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")
                    if attributes & control or is_markup(name):
                        names.append(name)
        return names


def is_markup(name: str) -> bool:
    """Return whether a user-defined token of this name structures a prompt, as a control token does."""
    return _BRACKETED.fullmatch(name) is not None and _HTML.fullmatch(name) is None


class ControlNames:
    """The names of a vocabulary's control tokens. Names of one character are left out: they cannot be cut in two."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name for name in names if len(name) > 1)
        lengths: dict[str, set[int]] = {}
        for name in self._names:
            lengths.setdefault(name[:2], set()).add(len(name))
        self._lengths = {pair: tuple(sorted(each)) for pair, each in lengths.items()}
        first_characters = "".join(sorted({name[0] for name in self._names}))
        self._first = re.compile(f"[{re.escape(first_characters)}]") if first_characters else None

    def starts(self, text: str) -> list[int]:
        """Return where names begin in `text`, in rising order. Names may overlap."""
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
