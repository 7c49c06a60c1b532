"""Sample a sequence's next token: sampler chain, grammar, logprobs, and whether the answer ends.

The parameters and their defaults are `core.engine.interface.Sampling`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from core.engine.interface import CallEnd, Delta, Event, TokenLogprob
from core.errors import ApiError

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context, SamplerChain, SamplerLink
    from core.engine.generation import Sequence
    from core.engine.grammar.compiler import Matcher
    from core.engine.interface import Cause, Sampling
    from core.engine.vocabulary import Vocabulary

SEED_SPACE = 1 << 32


def draw_seed() -> int:
    """Return a seed from the system's random source.

    It must not come from earlier state: two environments that are restored from one snapshot would draw the same.
    """
    # llama.cpp reads 0xFFFFFFFF as "choose a seed".
    return int.from_bytes(os.urandom(4), "little") % (SEED_SPACE - 1)


class Sampler:
    """The sampler chain of one sequence: logit bias, penalties, top-k, top-p, min-p, temperature, draw.

    It is C memory. Call `free` when the sequence has ended.

    `repeatable` says whether the same request should give the same text. It does on an idle server, if the prompt is
    cached completely or not at all. While other sequences run it is best effort, as with OpenAI's `seed`: another
    batch shape adds up floats in another order. A prompt that is partly cached, or prefilled in slices, has another
    shape.
    """

    def __init__(
        self,
        bindings: Bindings,
        sampling: Sampling,
        *,
        prompt: Iterable[int] = (),
        n_vocab: int,
        n_ctx: int,
        index: int,
    ) -> None:
        """`index` of the sequence is added to the seed. `repeat_penalty` counts the tokens of `prompt`."""
        self._sample = bindings.llama_sampler_sample
        self._accept = bindings.llama_sampler_accept
        self._free = bindings.llama_sampler_free
        self.penalised = bool(sampling.repeat_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)
        self.repeatable = sampling.seed is not None or sampling.temperature <= 0
        chain = bindings.llama_sampler_chain_init(bindings.llama_sampler_chain_default_params())
        links = []
        # 1) Links that change logits.
        if sampling.logit_bias:
            biases = (bindings.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
            links.append(bindings.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
        links += _penalties(bindings, sampling, prompt, n_vocab, n_ctx)
        # 2) Links that choose a token.
        if sampling.temperature <= 0:
            links.append(bindings.llama_sampler_init_greedy())
        else:
            if sampling.top_k > 0:
                links.append(bindings.llama_sampler_init_top_k(sampling.top_k))
            if sampling.top_p < 1:
                links.append(bindings.llama_sampler_init_top_p(sampling.top_p, 1))
            if sampling.min_p > 0:
                links.append(bindings.llama_sampler_init_min_p(sampling.min_p, 1))
            if sampling.temperature != 1:
                links.append(bindings.llama_sampler_init_temp(sampling.temperature))
            seed = draw_seed() if sampling.seed is None else (sampling.seed + index) % (SEED_SPACE - 1)
            links.append(bindings.llama_sampler_init_dist(seed))
        for link in links:
            bindings.llama_sampler_chain_add(chain, link)
        self._chain: SamplerChain | None = chain

    def sample(self, context: Context, output: int) -> int:
        """Draw a token from the logits at batch index `output`, and count it for the penalties."""
        assert self._chain is not None
        return self._sample(self._chain, context, output)

    def accept(self, token: int) -> None:
        """Count a token that was not drawn, but forced by a grammar, for the penalties."""
        if self.penalised and self._chain is not None:
            self._accept(self._chain, token)

    def free(self) -> None:
        if self._chain is not None:
            self._free(self._chain)
            self._chain = None


def _penalties(
    bindings: Bindings, sampling: Sampling, prompt: Iterable[int], n_vocab: int, n_ctx: int
) -> list[SamplerLink]:
    """Return the links for the penalties that are set. Their window is the context, so they see the whole answer."""
    links = []
    if sampling.repeat_penalty != 1.0:
        repeat = bindings.llama_sampler_init_penalties(n_vocab, n_ctx, sampling.repeat_penalty, 0.0, 0.0)
        # As in transformers and llama-server the prompt counts, too. How often a token occurs makes no difference.
        for token in set(prompt):
            bindings.llama_sampler_accept(repeat, token)
        links.append(repeat)
    if sampling.presence_penalty or sampling.frequency_penalty:
        # OpenAI's two penalties count the answer only.
        links.append(
            bindings.llama_sampler_init_penalties(
                n_vocab, n_ctx, 1.0, sampling.frequency_penalty, sampling.presence_penalty
            )
        )
    return links


class TokenStep:
    """Turns one row of logits into a sequence's next tokens. Runs in the engine thread.

    `n_limit` is the most tokens that a sequence may have, prompt included.
    """

    def __init__(self, bindings: Bindings, context: Context, vocabulary: Vocabulary, n_limit: int) -> None:
        self._bindings = bindings
        self._context = context
        self._vocabulary = vocabulary
        self._n_limit = n_limit

    def advance(self, sequence: Sequence, row: int) -> Delta:
        """Draw the next token and append the tokens that the grammar then forces. Return what they say.

        Raises ApiError if the grammar allows no token, or exceeds llguidance's limits.
        """
        request, output = sequence.request, sequence.output
        # 1) Logprobs, before the grammar masks any logits: they are the model's own probabilities.
        logprobs = None
        if request.top_logprobs is not None:
            logprobs = log_softmax(logits_of(self._bindings, self._context, row, self._vocabulary.n_tokens))
        # 2) Draw a token. At the end of the reasoning's budget the closer replaces it.
        reasoning = output.parser is not None and output.parser.reasoning
        token = self._draw(sequence, None if reasoning else sequence.matcher, row)
        if reasoning and self._closes_reasoning(sequence, token):
            assert request.output is not None
            drawn = list(request.output.closer)
        elif self._vocabulary.is_end(token):
            return self._end(sequence, output.finish(cut=False))
        else:
            drawn = [token, *([] if reasoning else self._forced(sequence))]
        entries = () if logprobs is None else (self._entry(logprobs, token, request.top_logprobs or 0),)
        # 3) Append it and the forced tokens, up to the limit.
        limit, limit_cause = self._limit(sequence)
        gained = drawn[:limit]
        sequence.tokens.extend(gained)
        events = output.push(gained)
        if output.parser is not None:
            events += self._follow_call(sequence)
        # 4) End on a stop string, a repeated call, a complete grammar or call, or the limit.
        reasoning_tokens = len(gained) if reasoning else 0
        sequence.whole_calls += sum(isinstance(event, CallEnd) for event in events)
        if output.stop is not None or output.repeated or (len(drawn) <= limit and self._complete(sequence)):
            return self._end(sequence, [*events, *output.finish(cut=False)], len(gained), entries, reasoning_tokens)
        if len(drawn) >= limit:
            events += output.finish(cut=True)
            return Delta(
                sequence.index, tuple(events), len(gained), entries, "length", limit_cause, None, reasoning_tokens
            )
        return Delta(sequence.index, tuple(events), len(gained), entries, reasoning_tokens=reasoning_tokens)

    def _end(
        self,
        sequence: Sequence,
        events: list[Event],
        tokens: int = 0,
        logprobs: tuple[TokenLogprob, ...] = (),
        reasoning_tokens: int = 0,
    ) -> Delta:
        """Return the last delta of a sequence that ended by itself."""
        called = sequence.whole_calls or any(isinstance(event, CallEnd) for event in events)
        return Delta(
            sequence.index,
            tuple(events),
            tokens,
            logprobs,
            "tool_calls" if called else "stop",
            stop=sequence.output.stop,
            reasoning_tokens=reasoning_tokens,
        )

    def _closes_reasoning(self, sequence: Sequence, token: int) -> bool:
        """Return whether the reasoning's closer has to replace `token`.

        It does at the end of the budget, and where the model would end its turn before a grammar was satisfied.
        """
        output = sequence.request.output
        if output is None or not output.closer:
            return False
        if sequence.matcher is not None and self._vocabulary.is_end(token):
            return True
        budget = output.reasoning_budget
        return budget is not None and sequence.reasoning_tokens >= budget

    def _follow_call(self, sequence: Sequence) -> list[Event]:
        """Constrain a call that the model has just opened, and lift the constraint from one that it has ended."""
        parser = sequence.output.parser
        if parser is None or sequence.call_matcher is None:
            return []
        if sequence.matcher is not None:
            if not parser.calling:
                sequence.matcher = None
            return []
        if not parser.calling:
            return []
        matcher = sequence.call_matcher.deep_copy()
        overrun = self._vocabulary.tokenize(parser.overrun, special=False, continued=True)
        if overrun and matcher.try_consume_tokens(overrun) < len(overrun):
            return sequence.output.reject()
        sequence.matcher = matcher
        return []

    def score(self, sequence: Sequence, row: int, token: int) -> TokenLogprob:
        """Return the logprob of a prompt's `token`, from the logits of the token before it."""
        logprobs = log_softmax(logits_of(self._bindings, self._context, row, self._vocabulary.n_tokens))
        return self._entry(logprobs, token, sequence.request.top_logprobs or 0)

    def _limit(self, sequence: Sequence) -> tuple[int, Cause]:
        """Return how many tokens the sequence may still gain, and which limit that is."""
        room, max_tokens = self._n_limit - len(sequence.tokens), sequence.request.max_tokens
        if max_tokens is not None and max_tokens - sequence.produced <= room:
            return max_tokens - sequence.produced, "max_tokens"
        return room, "context"

    def _draw(self, sequence: Sequence, matcher: Matcher | None, row: int) -> int:
        """Draw a token that the grammar allows, if there is a grammar.

        Most draws need no mask, which costs 0.2-0.4 ms. So draw freely first: keep the token if the grammar allows it,
        otherwise mask the logits and draw again. This gives the masked distribution: p + (1 - P) p / P = p / P, where
        P is the allowed probability mass. With top_k, top_p or min_p it is not exact, because the first draw cuts off
        the tail of unmasked logits, as in llama.cpp's own grammar sampling. With penalties the mask always comes
        first, because a rejected draw would count for them.
        """
        sampler = sequence.sampler
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

    def _accepts(self, matcher: Matcher, token: int) -> bool:
        """Return whether the grammar allows the token, and advance the grammar if so."""
        if self._vocabulary.is_end(token):
            return bool(matcher.is_accepting())
        return bool(matcher.try_consume_tokens([token]) == 1)

    def _mask(self, matcher: Matcher, row: int) -> None:
        import numpy as np

        n_vocab = self._vocabulary.n_tokens
        logits = logits_of(self._bindings, self._context, row, n_vocab)
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), count=n_vocab, bitorder="little")
        logits[allowed == 0] = -np.inf

    def _forced(self, sequence: Sequence) -> list[int]:
        """Return the tokens to which the grammar leaves no alternative. They need no logits: one decode takes them all.

        With logprobs no token is forced, because each one needs its logits.
        """
        matcher = sequence.matcher
        if matcher is None or sequence.request.top_logprobs is not None or matcher.is_stopped():
            return []
        tokens = matcher.compute_ff_tokens()
        if tokens:
            tokens = tokens[: matcher.try_consume_tokens(tokens)]
            for token in tokens:
                sequence.sampler.accept(token)
        return tokens

    def _complete(self, sequence: Sequence) -> bool:
        """Return whether the sequence has all that its grammar, or its one allowed call, asks for."""
        matcher, output = sequence.matcher, sequence.request.output
        if matcher is None:
            return output is not None and output.end_after_call and sequence.whole_calls > 0
        if matcher.is_error():
            raise ApiError(f"the grammar failed: {matcher.get_error()}")
        if not matcher.is_stopped():
            return False
        if sequence.call_matcher is None:
            return True
        sequence.matcher = None  # a call of several is complete
        return output is not None and output.end_after_call

    def _entry(self, logprobs: Any, token: int, top: int) -> TokenLogprob:
        label = self._vocabulary.label
        return TokenLogprob(
            token=label(token),
            logprob=float(logprobs[token]),
            top=tuple((label(other), float(logprobs[other])) for other in likeliest(logprobs, top)),
            control=not self._vocabulary.piece(token),
        )


def logits_of(bindings: Bindings, context: Context, output: int, n_vocab: int) -> Any:
    """Return the logits at batch index `output` as a writable numpy view of llama.cpp's buffer.

    The view is valid until the next decode.
    """
    import numpy as np  # only masks and logprobs need it: 0.1-0.3 s at a cold start

    pointer = bindings.llama_get_logits_ith(context, output)
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * n_vocab)).contents)


def log_softmax(logits: Any) -> Any:
    """Return the natural logarithms of the probabilities, float32 of shape (n_vocab,)."""
    import numpy as np

    highest = logits.max()
    return logits - (highest + np.log(np.exp(logits - highest).sum()))


def likeliest(logprobs: Any, count: int) -> list[int]:
    """Return the indices of the `count` largest entries, largest first."""
    import numpy as np

    count = min(count, len(logprobs))
    if count == 0:
        return []
    top = np.argpartition(logprobs, -count)[-count:]
    return [int(token) for token in top[np.argsort(-logprobs[top], kind="stable")]]
