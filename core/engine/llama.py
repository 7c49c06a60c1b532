"""Load a GGUF model with llama.cpp and serve it through the Engine interface."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from core.engine import cpus, gguf_model, native
from core.engine.generation import GenerationStream, Sequence
from core.engine.grammar.compiler import GrammarCompiler
from core.engine.interface import EngineConfig, GenerationRequest
from core.engine.output.reader import OutputReader
from core.engine.prompt import templates
from core.engine.sampling import Sampler, TokenStep
from core.engine.vocabulary import Vocabulary
from core.engine.worker import Worker
from core.errors import ApiError, ContextOverflow, InvalidRequest, ModelUnavailable
from core.store.model_file import ModelFile

if TYPE_CHECKING:
    from core.engine.bindings import Context

PREPARE_WITHIN_S = 3.0  # after the load, even if requests keep coming
LOOK_S, QUIET_LOOKS = 0.05, 6
REST_S = 0.002  # between two slices of the vocabulary

logger = logging.getLogger("slm.engine")


class Llama:
    """Implements `core.engine.interface.Engine`."""

    def __init__(
        self,
        file: ModelFile,
        config: EngineConfig,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load the model and make its context. Blocks. `progress` is called with the share loaded, 0 to 1.

        If `file.arrival` is set, the weights are still being downloaded: they are mapped but not read, and the engine
        thread waits for them before its first decode. Raises InvalidRequest if llama.cpp cannot load the file, or the
        context does not fit in memory.
        """
        self._bindings = bindings = native.bindings()
        self._file = file
        self._closed = False
        self._close_lock = threading.Lock()
        # Importing Jinja takes 0.1 s of Python. The load below runs in C, so do both at once.
        threading.Thread(target=importlib.import_module, args=("core.engine.prompt.sandbox",), daemon=True).start()
        native.set_verbose(config.verbose)
        config = replace(config, n_threads=config.n_threads or cpus.available())
        self._model = gguf_model.load(bindings, file, config, progress)
        try:
            self._check_generates()
            self._context = self._make_context(config)
        except BaseException:
            bindings.llama_model_free(self._model)
            raise
        self._vocabulary = Vocabulary(bindings, self._model)
        self._grammars = GrammarCompiler(bindings, self._model)
        self.config = config
        self.card = gguf_model.describe(
            bindings, self._model, file, self._vocabulary, n_ctx=int(bindings.llama_n_ctx(self._context))
        )
        if self.card.n_ctx < config.n_ctx:
            logger.warning(
                "%s was trained on %s tokens: all requests share N_CTX %s, and one request may use %s",
                file.name,
                self.card.n_ctx_train,
                config.n_ctx,
                self.card.n_ctx,
            )
        recurrent = bool(bindings.llama_model_is_recurrent(self._model))
        self._worker = Worker(
            bindings,
            self._context,
            TokenStep(bindings, self._context, self._vocabulary, self.card.n_ctx),
            n_batch=int(bindings.llama_n_batch(self._context)),
            n_parallel=config.n_parallel,
            n_limit=self.card.n_ctx,
            n_cells=None if recurrent else int(bindings.llama_n_ctx(self._context)),
            max_queue=config.max_queue,
            window=int(bindings.llama_model_n_swa(self._model)),
            trimmable=not (recurrent or bindings.llama_model_is_hybrid(self._model)),
            arrival=None if file.arrival is None else file.arrival.wait,
        )
        self._preparing = threading.Thread(target=self._prepare, name="prepare", daemon=True)
        self._preparing.start()

    @property
    def failed(self) -> ApiError | None:
        return self._worker.failed

    def tokenize(self, text: str, *, special: bool, continued: bool = False) -> list[int]:
        return self._vocabulary.tokenize(text, special=special, continued=continued)

    def token_pieces(self, tokens: Collection[int], *, special: bool) -> list[bytes]:
        return self._vocabulary.pieces(tokens, special=special)

    def is_end(self, token: int) -> bool:
        return self._vocabulary.is_end(token)

    def control_names(self, text: str) -> list[int]:
        if len(text) < 2:  # as in the warm-up, which must not wait until the names have been read
            return []
        return self._vocabulary.control_names().starts(text)

    def check_grammar(self, grammar: str) -> None:
        self._grammars.matcher(grammar)

    def generate(self, request: GenerationRequest) -> GenerationStream:
        if len(request.prompt) + 1 > self.card.n_ctx:
            raise ContextOverflow(len(request.prompt), self.card.n_ctx, self.card.remedy)
        if not request.prompt:
            raise InvalidRequest("The prompt is empty: it has no tokens.", param="messages")
        n_vocab = self._vocabulary.n_tokens
        unknown = [token for token in request.sampling.logit_bias if not 0 <= token < n_vocab]
        if unknown:
            raise InvalidRequest(
                f"'logit_bias' has token {unknown[0]}, but this model's tokens are 0 to {n_vocab - 1}.",
                param="logit_bias",
            )
        grammar = None if request.grammar is None else self._grammars.matcher(request.grammar)
        calls = request.output.call_grammar if request.output else None
        call_matcher = None if calls is None else self._grammars.matcher(calls)
        stream = GenerationStream(request, self._worker.interrupt)
        samplers: list[Sampler] = []
        sequences: list[Sequence] = []
        try:
            for index in range(request.n):
                sampler = Sampler(
                    self._bindings,
                    request.sampling,
                    prompt=request.prompt,
                    n_vocab=n_vocab,
                    n_ctx=self.card.n_ctx,
                    index=index,
                )
                samplers.append(sampler)
                sequence = Sequence(
                    request,
                    index,
                    stream,
                    sampler,
                    OutputReader(self._vocabulary, request),
                    sequences[0] if sequences else None,
                    matcher=grammar if grammar is None or index == 0 else grammar.deep_copy(),
                    call_matcher=call_matcher,
                )
                sequences.append(sequence)
            self._worker.submit(sequences)
        except BaseException:
            for sampler in samplers:
                sampler.free()
            stream.cancel()
            raise
        return stream

    def warm(self) -> None:
        self._worker.prime(templates.shared_prefix(self))

    def stats(self) -> dict[str, Any]:
        return self._worker.stats()

    def stop(self) -> None:
        self._worker.close()

    def close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            if self._file.arrival is not None:
                self._file.arrival.cancel()
            self._worker.close()
            self._vocabulary.close()
            self._grammars.close()
            self._preparing.join()
            self._bindings.llama_free(self._context)
            self._bindings.llama_model_free(self._model)
            self._file.release()
            native.trim_heap()

    def _check_generates(self) -> None:
        """Raise InvalidRequest for a model whose first decode would abort the process.

        The file's header was checked for known architectures before. llama.cpp knows about newer ones.
        """
        bindings, model = self._bindings, self._model
        if bindings.llama_model_is_diffusion(model):
            raise self._cannot_generate("a diffusion model")
        details = gguf_model.metadata(bindings, model)
        if details.get(f"{details.get('general.architecture')}.attention.causal") == "false":
            raise self._cannot_generate("an embedding model")
        if bindings.llama_model_has_encoder(model) or not bindings.llama_model_has_decoder(model):
            raise self._cannot_generate("an encoder or encoder-decoder model")

    def _cannot_generate(self, kind: str) -> InvalidRequest:
        return InvalidRequest(
            f"The model '{self._file.name}' is {kind}; only models that generate text can be served."
            f"{' EMBEDDING_MODEL_PATH serves embedding models.' if kind == 'an embedding model' else ''}",
            param="model_path",
        )

    def _make_context(self, config: EngineConfig) -> Context:
        bindings = self._bindings
        params = bindings.llama_context_default_params()
        params.n_ctx = config.n_ctx
        params.n_seq_max = config.n_parallel + 1  # one more for the template's shared prefix
        params.n_batch = params.n_ubatch = max(min(config.n_batch, config.n_ctx), params.n_seq_max)
        # Only the last token of a sequence needs logits: 5 rows instead of n_batch, 256 MB less for Gemma 3.
        params.n_outputs_max = params.n_seq_max
        params.n_outputs_max_per_seq = 1
        params.n_threads = params.n_threads_batch = config.n_threads
        # Flash attention stays llama.cpp's "auto". It skips the cells of other sequences, and idle prefixes are in the
        # same cache: with 2,000 idle cells a token took 9-10 ms with it and 16-18 ms without (7.6-9 ms with none). It
        # is as accurate: the KL divergence to a float32 cache over 1,000 tokens of text is 6.1e-3 with and without it
        # (SmolLM2), 1.6e-2 and 1.5e-2 (Gemma).
        params.kv_unified = True
        # The cache of a sliding window can be truncated to a shared prefix only if it has the full size. llama.cpp
        # still reuses cells that the window has passed, so `Cache` checks a prefix before it uses it.
        params.swa_full = True
        with native.captured_errors() as reasons:
            context = bindings.llama_init_from_model(self._model, params)
        if not context:
            logger.error("llama.cpp cannot make a context: %s", "; ".join(reasons) or "no reason given")
            raise InvalidRequest(
                f"llama.cpp cannot make a context of {config.n_ctx} tokens for '{self._file.name}'. "
                "Most likely it does not fit in memory: lower n_ctx.",
                param="n_ctx",
            )
        if not bindings.llama_get_memory(context):
            bindings.llama_free(context)
            raise self._cannot_generate("an embedding model")
        return context

    def _prepare(self) -> None:
        """Read the control names, and build the grammar tokenizer in the background.

        For 262k tokens the tokenizer takes and releases the interpreter lock half a million times. Run at once, it cut
        the download of the tensors from 80 to 62 MB/s, and delayed the first token by 0.1-0.2 s. So it waits for the
        tensors and then for a quiet moment, up to PREPARE_WITHIN_S. A request with a grammar builds it immediately.
        """
        with contextlib.suppress(ModelUnavailable):
            # 1) The first prompt needs the control names.
            self._vocabulary.control_names()
        # 2) Wait for the tensors, and for a quiet moment.
        if self._file.arrival is not None:
            with contextlib.suppress(ApiError):
                self._file.arrival.wait()
        quiet, end = 0, time.monotonic() + PREPARE_WITHIN_S
        while quiet < QUIET_LOOKS and time.monotonic() < end and not self._closed:
            time.sleep(LOOK_S)
            stats = self._worker.stats()
            quiet = 0 if stats["queued"] or stats["sequences"]["running"] else quiet + 1
        # 3) Build the tokenizer, at normal priority. llguidance holds the interpreter lock meanwhile (0.1 s for 49k
        # tokens, 1.2 s for 262k): at a low priority all other Python threads would wait for a thread that gets a tenth
        # of a CPU.
        with contextlib.suppress(ModelUnavailable):  # the model was closed meanwhile
            self._grammars.prepare(lambda: time.sleep(REST_S))
