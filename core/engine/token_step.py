"""Step: from one row of logits to what a sequence gained. Sampling, grammar, logprobs, text, and whether it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.engine.interface import Cause, FinishReason, TokenLogprob
from core.engine.sampling import likeliest, log_softmax, logits_of
from core.errors import ApiError

if TYPE_CHECKING:
    from core.engine.sequence import Sequence
    from core.engine.vocabulary import Vocabulary


class Step:
    """Holds what is the same for all sequences of a model; runs in the engine thread.

    `n_limit` is the most tokens a sequence may have, prompt included.
    """

    def __init__(self, bindings: Any, context: Any, vocabulary: Vocabulary, n_limit: int) -> None:
        self._bindings = bindings
        self._context = context
        self._vocabulary = vocabulary
        self._n_limit = n_limit

    def advance(
        self, sequence: Sequence, row: int
    ) -> tuple[str, int, tuple[TokenLogprob, ...], FinishReason | None, Cause | None]:
        """Draw the next token and append the tokens that the grammar then forces.

        Returns (text, tokens, logprobs, finish_reason, cause).

        Raises ApiError if the grammar leaves no token, or gives up (llguidance bounds its own work).
        """
        request = sequence.request
        logprobs = None
        if request.top_logprobs is not None:
            # Before the grammar's mask: what is reported is the model's own opinion.
            logprobs = log_softmax(logits_of(self._bindings, self._context, row, self._vocabulary.n_tokens))
        token = self._draw(sequence, row)
        if self._vocabulary.is_end(token):
            return sequence.text.finish(), 0, (), "stop", None
        entries = () if logprobs is None else (self._entry(logprobs, token, request.top_logprobs or 0),)

        drawn = [token, *self._forced(sequence)]
        limit, limit_cause = self._limit(sequence)
        gained = drawn[:limit]
        sequence.tokens.extend(gained)
        text = sequence.text.push(b"".join(map(self._vocabulary.piece, gained)))

        finish_reason: FinishReason | None = None
        cause: Cause | None = None
        if sequence.text.stopped or (sequence.matcher is not None and len(drawn) <= limit and self._complete(sequence)):
            finish_reason = "stop"
        elif len(drawn) >= limit:
            finish_reason, cause = "length", limit_cause
        if finish_reason is not None:
            text += sequence.text.finish()
        return text, len(gained), entries, finish_reason, cause

    def _limit(self, sequence: Sequence) -> tuple[int, Cause]:
        """How many tokens the sequence may still gain, and which limit says so."""
        room, max_tokens = self._n_limit - len(sequence.tokens), sequence.request.max_tokens
        if max_tokens is not None and max_tokens - sequence.produced <= room:
            return max_tokens - sequence.produced, "max_tokens"
        return room, "context"

    def _draw(self, sequence: Sequence, row: int) -> int:
        """Sample a token that the grammar, if there is one, allows.

        The free draw is tried first: a token that is allowed stands, else the row is masked and drawn from again. That
        gives the masked distribution (p + (1 - P) p / P = p / P for P the allowed mass), and most draws need no mask,
        which costs 0.2-0.4 ms. With top_k, top_p or min_p it is not exactly that one: the first draw cuts off the
        unmasked row's tail, as llama.cpp's own grammar sampling does. Not with penalties: a draw that is thrown away
        would count for them.
        """
        sampler, matcher = sequence.sampler, sequence.matcher
        if matcher is None:
            return sampler.sample(self._context, row)
        if not sampler.penalised:
            token = sampler.sample(self._context, row)
            if self._accepts(matcher, token):
                return token
        self._mask(matcher, row)
        token = sampler.sample(self._context, row)
        if not self._accepts(matcher, token):
            raise ApiError(f"the grammar allows no token that could be drawn: {matcher.get_error() or 'mask is empty'}")
        return token

    def _accepts(self, matcher: Any, token: int) -> bool:
        """Whether the grammar takes the token; if so it has then moved on."""
        if self._vocabulary.is_end(token):
            return bool(matcher.is_accepting())
        return bool(matcher.try_consume_tokens([token]) == 1)

    def _mask(self, matcher: Any, row: int) -> None:
        import numpy as np

        n_vocab = self._vocabulary.n_tokens
        logits = logits_of(self._bindings, self._context, row, n_vocab)
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), count=n_vocab, bitorder="little")
        logits[allowed == 0] = -np.inf

    def _forced(self, sequence: Sequence) -> list[int]:
        """Tokens that the grammar leaves no choice about: they need no logits, one decode takes them all.

        With logprobs each token needs its row, so none is forced.
        """
        matcher = sequence.matcher
        if matcher is None or sequence.request.top_logprobs is not None or matcher.is_stopped():
            return []
        tokens: list[int] = matcher.compute_ff_tokens()
        if tokens:
            tokens = tokens[: matcher.try_consume_tokens(tokens)]
            for token in tokens:
                sequence.sampler.accept(token)
        return tokens

    def _complete(self, sequence: Sequence) -> bool:
        """Whether the grammar is satisfied and allows nothing more."""
        matcher = sequence.matcher
        if matcher.is_error():
            raise ApiError(f"the grammar gave up: {matcher.get_error()}")
        return bool(matcher.is_stopped())

    def _entry(self, logprobs: Any, token: int, top: int) -> TokenLogprob:
        label = self._vocabulary.label
        return TokenLogprob(
            token=label(token),
            logprob=float(logprobs[token]),
            top=tuple((label(other), float(logprobs[other])) for other in likeliest(logprobs, top)),
        )
