"""Run an embedding model: one thread computes the vectors of several texts in each llama.cpp batch.

An encoder sees a text as a whole, so all tokens of a text are in one batch, and the batch has room for the longest
text. A model with causal attention that takes its last token (Qwen3-Embedding) can read a text in slices.
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import unicodedata
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from core.engine import cpus, gguf_model, native
from core.engine.interface import EngineConfig, Pooling, Vector
from core.engine.vocabulary import Vocabulary
from core.errors import ApiError, Busy, InvalidRequest, ModelUnavailable
from core.store.model_file import ModelFile
from core.store.target import free_memory

if TYPE_CHECKING:
    from core.engine.bindings import Context

logger = logging.getLogger("slm.engine")

MOST_TEXTS = 64  # in one batch
# Tokens of several texts in one batch; one text may be longer. More gain nothing, because attention grows with the
# square of a batch, and keep others waiting. Measured with all-MiniLM-L6-v2 and 200 texts of 12 tokens on 2 threads, in
# CPU seconds: batches of 12 tokens 3.9, 32: 2.6, 64: 1.7, 128: 1.4, 256: 1.3, 512: 1.3.
PACKED_TOKENS = 256
OUTPUT_BYTES = 64 << 20  # of the output buffer of a packed batch, see `LlamaEmbedder._output_bytes`
_SYLLABLES = re.compile("[\uac00-\ud7a3]+")
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "cls", "last", "rank")  # by llama.cpp's numbers


@dataclass(slots=True, eq=False)
class Job:
    """The texts of one request, as tokens, and the vectors that are there so far."""

    texts: Sequence[Sequence[int]]
    done: Future[list[Vector]] = field(default_factory=Future)
    taken: int = 0  # texts that are in a batch or computed
    vectors: dict[int, Vector] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.done.done()


class Member(NamedTuple):
    """One text of a batch."""

    job: Job
    place: int  # of the text in its job

    @property
    def tokens(self) -> Sequence[int]:
        return self.job.texts[self.place]


class Slice(NamedTuple):
    """A part of a text: the tokens from `start` to `end` of the batch's member number `slot`."""

    slot: int
    start: int
    end: int


def fill(jobs: deque[Job], most_tokens: int) -> list[Member]:
    """Take texts for one batch, in turn from each job, so that a long request does not hold up a short one.

    The first text is taken whatever its length. A job whose texts are all taken leaves the queue.
    """
    members: list[Member] = []
    room = most_tokens
    while jobs and len(members) < MOST_TEXTS:
        job = jobs[0]
        length = len(job.texts[job.taken])
        if members and length > room:
            break
        members.append(Member(job, job.taken))
        room -= length
        job.taken += 1
        jobs.popleft()
        if job.taken < len(job.texts):
            jobs.append(job)
    return members


def slices(lengths: Sequence[int], most: int) -> Iterator[list[Slice]]:
    """Cut texts, laid end to end, into pieces of at most `most` tokens, one for each decode call."""
    piece: list[Slice] = []
    room = most
    for slot, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            piece.append(Slice(slot, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


def encode_pair(vocabulary: Vocabulary, query: str, document: str, template: str | None) -> list[int]:
    """Return the tokens of a query and a document, as a reranker reads them.

    Without a template of the model's own they are joined as in training: [CLS] query [SEP] document [SEP] for BERT,
    <s> query </s></s> document </s> for XLM-RoBERTa. Both texts are plain text in any case.
    """
    parts = {"{query}": query, "{document}": document}
    if template is not None:
        tokens: list[int] = []
        for part in re.split(r"(\{query\}|\{document\})", template):
            text, special = (parts[part], False) if part in parts else (part, True)
            tokens += vocabulary.tokenize(text, special=special, continued=bool(tokens))
        return tokens
    eos = vocabulary.eos if vocabulary.eos >= 0 else vocabulary.sep
    end = [eos] if vocabulary.adds_eos else []
    separator = [vocabulary.sep] if vocabulary.adds_sep else []
    return [
        *([vocabulary.bos] if vocabulary.adds_bos else []),
        *vocabulary.tokenize(query, special=False),
        *end,
        *separator,
        *vocabulary.tokenize(document, special=False),
        *(end or separator),
    ]


class LlamaEmbedder:
    """Implements `core.engine.interface.Embedder`."""

    def __init__(self, file: ModelFile, config: EngineConfig, progress: Callable[[float], None] | None = None) -> None:
        """Load the model and make its context. Blocks. `progress` is called with the share loaded, 0 to 1.

        Raises InvalidRequest if llama.cpp cannot load the file, the model is not one that embeds texts, or the context
        does not fit in memory.
        """
        self._bindings = bindings = native.bindings()
        self._file = file
        self.config = config = replace(config, n_threads=config.n_threads or cpus.available())
        self._model = gguf_model.load(bindings, file, config, progress)
        try:
            if bindings.llama_model_has_encoder(self._model) or bindings.llama_model_is_diffusion(self._model):
                raise InvalidRequest(
                    f"The model '{file.name}' is an encoder-decoder or diffusion model and makes no embeddings.",
                    param="model_path",
                )
            self._vocabulary = Vocabulary(bindings, self._model)
            self._context, n_limit, _ = self._make_context(config)
        except BaseException:
            bindings.llama_model_free(self._model)
            raise
        self.pooling: Pooling = POOLINGS[bindings.llama_pooling_type(self._context)]
        self.card = gguf_model.describe(bindings, self._model, file, self._vocabulary, n_ctx=n_limit)
        scores = int(bindings.llama_model_n_cls_out(self._model))
        self.n_dimensions = scores if self.pooling == "rank" else int(bindings.llama_model_n_embd_out(self._model))
        # llama.cpp ends these models' graph in a softmax (build_pooling in llama-graph.cpp).
        self.probabilities = self.pooling == "rank" and self.card.architecture in ("qwen3", "qwen3vl")
        template = bindings.llama_model_chat_template(self._model, b"rerank")
        self._pair_template = None if not template else template.decode("utf-8", "replace")
        self._decomposes = (
            bindings.llama_vocab_type(bindings.llama_model_get_vocab(self._model)) == bindings.LLAMA_VOCAB_TYPE_WPM
            and self.card.metadata.get("tokenizer.ggml.normalizer.strip_accents") != "false"
        )
        self._memory = bindings.llama_get_memory(self._context)
        self._batch = native.Batch(bindings, int(bindings.llama_n_batch(self._context)), MOST_TEXTS)
        self._packed = min(PACKED_TOKENS, max(64, OUTPUT_BYTES // self._output_bytes))
        if self._memory:  # the KV cells hold a batch as a whole
            self._packed = min(self._packed, int(bindings.llama_n_ctx(self._context)))
        self._abort = native.Abort(bindings, self._context)
        self._change = threading.Condition()
        self._jobs: deque[Job] = deque()  # with texts that are not taken; under the condition
        self._outstanding: set[Job] = set()  # under the condition
        self._stopped = False
        self._freed = False
        self._failure: ApiError | None = None
        self._counters = {"requests": 0, "texts": 0, "prompt_tokens": 0, "decode_calls": 0, "aborted": 0}
        self._thread = threading.Thread(target=self._run, name="embeddings", daemon=True)
        self._thread.start()

    # From any thread

    @property
    def failed(self) -> ApiError | None:
        return self._failure

    def encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(self._decomposed(text))

    def encode_pair(self, query: str, document: str) -> list[int]:
        texts = self._decomposed(query), self._decomposed(document)
        return encode_pair(self._vocabulary, *texts, self._pair_template)

    def embed(self, texts: Sequence[Sequence[int]]) -> Future[list[Vector]]:
        with self._change:
            if self._failure is not None:
                raise self._failure
            if self._stopped:
                raise ModelUnavailable("The model is being released. Try again.", retry_after=1)
            if len(self._outstanding) > self.config.max_queue:
                raise Busy(
                    f"The queue of the embedding model is full ({len(self._outstanding)} requests). Try again later."
                )
            job = Job(texts)
            self._jobs.append(job)
            self._outstanding.add(job)
            self._counters["requests"] += 1
            self._change.notify()
        job.done.add_done_callback(lambda _: self._end(job))
        return job.done

    def warm(self) -> None:
        """Page in the weights with a text of one token. Does not wait for it."""
        token = self._vocabulary.bos if self._vocabulary.bos >= 0 else 0
        self.embed([[token]])

    def stats(self) -> dict[str, Any]:
        with self._change:
            return {**self._counters, "queued": len(self._outstanding)}

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify()
        self._abort.stop()
        self._thread.join()

    def close(self) -> None:
        if self._file.arrival is not None:
            self._file.arrival.cancel()
        self.stop()
        with self._change:
            if self._freed:
                return
            self._freed = True
        self._vocabulary.close()
        self._bindings.llama_free(self._context)
        self._bindings.llama_model_free(self._model)
        self._file.release()
        native.trim_heap()

    def _decomposed(self, text: str) -> str:
        """Decompose Korean syllables: llama.cpp's own decomposition keeps only the first letter of each.

        The whole text must not go through `unicodedata`: it sorts combining marks in quadratic time, under the
        interpreter lock.
        """
        if not self._decomposes:
            return text
        return _SYLLABLES.sub(lambda match: unicodedata.normalize("NFD", match[0]), text)

    def _end(self, job: Job) -> None:
        """Forget a job that is done or whose client has left. A decode call without any other job is aborted."""
        with self._change:
            self._outstanding.discard(job)
        self._abort.look()

    # The context

    def _make_context(self, config: EngineConfig) -> tuple[Context, int, bool]:
        """Return a context, the most tokens that a text may have, and whether long texts are read in slices.

        Whether slices are possible is known only from a context. If the file says that the model takes its last token,
        try a batch of N_BATCH tokens: llama.cpp reserves room for the logits of every token of a batch, 0.6 MB each
        for a vocabulary of 151,000.
        """
        bindings = self._bindings
        trained = int(bindings.llama_model_n_ctx_train(self._model))
        n_limit = min(config.n_ctx, trained) if trained > 0 else config.n_ctx
        details = gguf_model.metadata(bindings, self._model)
        pooling = details.get(f"{details.get('general.architecture')}.pooling_type")
        if pooling is not None and pooling not in map(str, range(len(POOLINGS))):  # llama.cpp asserts
            raise InvalidRequest(
                f"The model '{self._file.name}' has the unknown pooling type {pooling[:20]}; 0 to {len(POOLINGS) - 1} "
                "are known.",
                param="model_path",
            )
        if pooling in (str(POOLINGS.index("last")), str(POOLINGS.index("rank"))):
            context = self._new_context(config, config.n_batch)
            if bindings.llama_get_memory(context) and bindings.llama_get_causal_attn(context):
                return context, n_limit, True
            bindings.llama_free(context)
        n_limit = self._fitting(n_limit)
        return self._new_context(config, max(PACKED_TOKENS, n_limit)), n_limit, False

    def _fitting(self, n_limit: int) -> int:
        """Return `n_limit`, or how many tokens the output buffer can have in half of the free memory."""
        fitting = free_memory() // 2 // self._output_bytes
        if not 0 < fitting < n_limit:
            return n_limit
        logger.warning(
            "%s may read %s tokens at once, but memory has room for %s: longer texts are refused",
            self._file.name,
            n_limit,
            fitting,
        )
        return fitting

    @property
    def _output_bytes(self) -> int:
        """What llama.cpp reserves and clears for each token of a batch: its logits, also for models without any."""
        return 4 * self._vocabulary.n_tokens

    def _new_context(self, config: EngineConfig, n_batch: int) -> Context:
        bindings = self._bindings
        params = bindings.llama_context_default_params()
        params.embeddings = True
        params.n_ctx = config.n_ctx
        params.n_seq_max = MOST_TEXTS
        params.n_batch = params.n_ubatch = max(n_batch, MOST_TEXTS)  # llama.cpp asserts that each sequence has room
        params.n_threads = params.n_threads_batch = config.n_threads
        params.kv_unified = True
        with native.captured_errors() as reasons:
            context = bindings.llama_init_from_model(self._model, params)
        if not context:
            logger.error("llama.cpp cannot make a context: %s", "; ".join(reasons) or "no reason given")
            raise InvalidRequest(
                f"llama.cpp cannot make a context of {config.n_ctx} tokens for '{self._file.name}'. "
                "Most likely it does not fit in memory: lower n_ctx.",
                param="n_ctx",
            )
        return context

    # In the engine thread

    def _run(self) -> None:
        try:
            if self._file.arrival is not None:
                self._file.arrival.wait()
            while members := self._take():
                self._compute(members)
        except ApiError as error:  # the weights cannot be read
            self._failure = error
        except BaseException:
            logger.exception("The embedding thread failed; the next request loads the model again.")
            self._failure = ModelUnavailable("The embedding model failed. The next request loads it again.")
        finally:
            with self._change:
                self._stopped = True
                jobs = list(self._outstanding)
            reason = self._failure or ModelUnavailable("The model was released before the answer was ready. Try again.")
            for job in jobs:
                _fail(job, reason)

    def _take(self) -> list[Member]:
        """Block until there are texts for a batch. Return none after `stop`."""
        with self._change:
            while not self._stopped:
                self._jobs = deque(job for job in self._jobs if not job.ended)
                if self._jobs:
                    return fill(self._jobs, self._packed)
                self._change.wait()
            return []

    def _compute(self, members: list[Member]) -> None:
        """Compute the vectors of one batch of texts."""
        lengths = [len(member.tokens) for member in members]
        self._abort.begin(member.job for member in members)
        try:
            if self._memory:
                self._bindings.llama_memory_clear(self._memory, False)
            for piece in slices(lengths, self._batch.size):
                if not self._decode(members, piece):
                    return
                for part in piece:
                    if part.end == lengths[part.slot]:
                        self._deliver(members[part.slot], self._vector(part.slot))
        finally:
            self._abort.end()

    def _decode(self, members: list[Member], piece: list[Slice]) -> bool:
        """Run llama.cpp on one piece. Return False if it was aborted or has failed; the jobs are failed then."""
        self._batch.clear()
        for slot, start, end in piece:
            self._batch.add(slot, list(members[slot].tokens[start:end]), start, logits=True, every=True)
        self._counters["decode_calls"] += 1
        with native.captured_errors() as reasons:
            status = self._bindings.llama_decode(self._context, self._batch.native)
        if status == 0:
            self._counters["prompt_tokens"] += self._batch.length
            return True
        if self._abort.raised:
            self._counters["aborted"] += 1
            return False
        logger.error("llama.cpp could not embed %s tokens: %s", self._batch.length, "; ".join(reasons) or status)
        for member in members:
            _fail(
                member.job,
                ModelUnavailable("The texts could not be embedded; memory may be short. Send fewer or shorter texts."),
            )
        return False

    def _vector(self, slot: int) -> Vector:
        pointer = self._bindings.llama_get_embeddings_seq(self._context, slot)
        return array("f", ctypes.string_at(pointer, 4 * self.n_dimensions)) if pointer else array("f")

    def _deliver(self, member: Member, vector: Vector) -> None:
        job = member.job
        job.vectors[member.place] = vector
        self._counters["texts"] += 1
        if len(job.vectors) == len(job.texts) and job.done.set_running_or_notify_cancel():
            job.done.set_result([job.vectors[index] for index in range(len(job.texts))])


def _fail(job: Job, reason: ApiError) -> None:
    if job.done.set_running_or_notify_cancel():
        job.done.set_exception(reason)
