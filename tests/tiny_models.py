"""Write tiny GGUF models with random weights, one for each kind of model.

Random weights are useless for checking answers, but they exercise memory, scheduling, vocabularies and crashes in
milliseconds. `KINDS` lists the models; the `tiny` fixture writes each file once per session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

EMBEDDING, HEADS, HIDDEN = 32, 2, 64
CONTEXT = 8192  # tokens the models claim to be trained on

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # of the "control" vocabulary
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
USER_DEFINED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "[TOOL]")

NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED_TYPE, BYTE = 1, 2, 3, 4, 6  # GGUF's types of tokens


class Writer:
    """A GGUF file under construction. `ones` adds norms without effect, `noise` adds weights from a fixed seed."""

    def __init__(self, path: Path, architecture: str, *, layers: int, context: int = CONTEXT) -> None:
        self.path = path
        self.gguf = gguf.GGUFWriter(path, architecture)
        self.gguf.add_name(path.stem)
        self.gguf.add_context_length(context)
        self.gguf.add_embedding_length(EMBEDDING)
        self.gguf.add_feed_forward_length(HIDDEN)
        self.gguf.add_block_count(layers)
        self._random = np.random.default_rng(0)

    def ones(self, *names: str, size: int = EMBEDDING) -> None:
        for name in names:
            self.gguf.add_tensor(name, np.ones(size, np.float32))

    def noise(self, shape: tuple[int, ...], *names: str) -> None:
        for name in names:
            self.gguf.add_tensor(name, self._random.standard_normal(shape, np.float32) * np.float32(0.2))

    def attention(self, block: str) -> None:
        self.noise((EMBEDDING, EMBEDDING), *(f"{block}.attn_{name}.weight" for name in ("q", "k", "v", "output")))

    def feed_forward(self, block: str) -> None:
        self.noise((HIDDEN, EMBEDDING), f"{block}.ffn_gate.weight", f"{block}.ffn_up.weight")
        self.noise((EMBEDDING, HIDDEN), f"{block}.ffn_down.weight")

    def tokens(self, model: str, tokens: Sequence[str], types: Sequence[int]) -> None:
        self.gguf.add_tokenizer_model(model)
        self.gguf.add_token_list(list(tokens))
        self.gguf.add_token_types(list(types))
        self.gguf.add_vocab_size(len(tokens))

    def save(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


# Vocabularies


def bytes_only(writer: Writer, *, size: int = 259, control: Sequence[str] = (), space_prefix: bool = False) -> int:
    """Write a SentencePiece vocabulary (specials, 256 bytes, `control`, words up to `size`) and return its size."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *control]
    types = [UNKNOWN, CONTROL_TYPE, CONTROL_TYPE, *[BYTE] * 256, *[CONTROL_TYPE] * len(control)]
    if space_prefix:
        tokens, types = [*tokens, "\u2581"], [*types, NORMAL]
    words = size - len(tokens)
    tokens += [f"\u2581word{index}" for index in range(words)]
    types += [NORMAL] * words
    writer.tokens("llama", tokens, types)
    writer.gguf.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.gguf.add_bos_token_id(1)
    writer.gguf.add_eos_token_id(2)
    writer.gguf.add_unk_token_id(0)
    writer.gguf.add_add_bos_token(True)
    writer.gguf.add_add_space_prefix(space_prefix)
    return len(tokens)


def byte_pairs(writer: Writer, control: Sequence[str] = CONTROL) -> int:
    """Write a byte-pair vocabulary as in GPT-2: the bytes, one pair of two spaces, then `control` and USER_DEFINED."""
    tokens = [*_byte_letters(), "\u0120\u0120", *control, *USER_DEFINED]
    types = [*[NORMAL] * 257, *[CONTROL_TYPE] * len(control), *[USER_DEFINED_TYPE] * len(USER_DEFINED)]
    writer.tokens("gpt2", tokens, types)
    writer.gguf.add_tokenizer_pre("qwen2")
    writer.gguf.add_token_merges(["\u0120 \u0120"])
    writer.gguf.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.gguf.add_add_bos_token(False)
    return len(tokens)


def _byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte: printable bytes map to themselves, the others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


# Architectures


def llama(path: Path, vocabulary: Callable[[Writer], int] = bytes_only, template: str | None = None) -> None:
    _llama(Writer(path, "llama", layers=1), vocabulary, template)


def llama_last(path: Path) -> None:
    """An embedding model with causal attention: the vector is that of the last token, which is EOS."""
    writer = Writer(path, "llama", layers=1)
    writer.gguf.add_pooling_type(gguf.PoolingType.LAST)
    writer.gguf.add_add_eos_token(True)
    _llama(writer, bytes_only, None)


def llama_bidirectional(path: Path) -> None:
    """An embedding model of an architecture that usually generates: its tokens see the tokens behind them."""
    writer = Writer(path, "llama", layers=1)
    writer.gguf.add_pooling_type(gguf.PoolingType.MEAN)
    writer.gguf.add_causal_attention(False)
    _llama(writer, bytes_only, None)


def llada(path: Path) -> None:
    """A diffusion model: it generates the whole answer at once and has no KV cache."""
    _llama(Writer(path, "llada", layers=1), bytes_only, None)


def _llama(writer: Writer, vocabulary: Callable[[Writer], int], template: str | None) -> None:
    n_vocab = vocabulary(writer)
    if template is not None:
        writer.gguf.add_chat_template(template)
    _heads(writer)
    writer.gguf.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.noise((n_vocab, EMBEDDING), "token_embd.weight")
    if n_vocab < 1000:  # a large one would double the file; without it llama.cpp uses the embedding as output
        writer.noise((n_vocab, EMBEDDING), "output.weight")
    writer.ones("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    writer.attention("blk.0")
    writer.feed_forward("blk.0")
    writer.save()


def gemma(path: Path) -> None:
    """Sliding-window attention: five layers see the last 16 tokens, one sees all."""
    writer = Writer(path, "gemma3", layers=6)
    n_vocab = bytes_only(writer)
    _heads(writer)
    size = EMBEDDING // HEADS
    writer.gguf.add_key_length(size)
    writer.gguf.add_value_length(size)
    writer.gguf.add_sliding_window(16)
    writer.gguf.add_rope_freq_base(10000.0)
    writer.noise((n_vocab, EMBEDDING), "token_embd.weight", "output.weight")
    writer.ones("output_norm.weight")
    for layer in range(6):
        block = f"blk.{layer}"
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        writer.ones(*(f"{block}.{name}.weight" for name in norms))
        writer.ones(f"{block}.attn_q_norm.weight", f"{block}.attn_k_norm.weight", size=size)
        writer.attention(block)
        writer.feed_forward(block)
    writer.save()


def lfm2(path: Path) -> None:
    """Hybrid: layers of short convolutions, whose state cannot be truncated, alternate with attention."""
    layers = 4
    writer = Writer(path, "lfm2", layers=layers)
    n_vocab = bytes_only(writer)
    _heads(writer, [0 if layer % 2 == 0 else HEADS for layer in range(layers)])
    writer.gguf.add_rope_freq_base(10000.0)
    writer.gguf.add_uint32("lfm2.shortconv.l_cache", 3)
    writer.noise((n_vocab, EMBEDDING), "token_embd.weight", "output.weight")
    writer.ones("token_embd_norm.weight")
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.ones(f"{block}.attn_norm.weight", f"{block}.ffn_norm.weight")
        writer.feed_forward(block)
        if layer % 2:
            writer.ones(f"{block}.attn_q_norm.weight", f"{block}.attn_k_norm.weight", size=EMBEDDING // HEADS)
            writer.attention(block)
        else:
            writer.noise((EMBEDDING, 3), f"{block}.shortconv.conv.weight")
            writer.noise((3 * EMBEDDING, EMBEDDING), f"{block}.shortconv.in_proj.weight")
            writer.noise((EMBEDDING, EMBEDDING), f"{block}.shortconv.out_proj.weight")
    writer.save()


def mamba(path: Path) -> None:
    """Recurrent: one state per sequence, no attention."""
    inner, state, rank, width = 2 * EMBEDDING, 8, 4, 4
    writer = Writer(path, "mamba", layers=2)
    n_vocab = bytes_only(writer)
    writer.gguf.add_layer_norm_rms_eps(1e-5)
    writer.gguf.add_ssm_conv_kernel(width)
    writer.gguf.add_ssm_inner_size(inner)
    writer.gguf.add_ssm_state_size(state)
    writer.gguf.add_ssm_time_step_rank(rank)
    writer.noise((n_vocab, EMBEDDING), "token_embd.weight", "output.weight")
    writer.ones("output_norm.weight")
    for layer in range(2):
        block = f"blk.{layer}"
        writer.ones(f"{block}.attn_norm.weight")
        writer.noise((2 * inner, EMBEDDING), f"{block}.ssm_in.weight")
        writer.noise((inner, width), f"{block}.ssm_conv1d.weight")
        writer.noise((inner,), f"{block}.ssm_conv1d.bias", f"{block}.ssm_dt.bias", f"{block}.ssm_d")
        writer.noise((rank + 2 * state, inner), f"{block}.ssm_x.weight")
        writer.noise((inner, rank), f"{block}.ssm_dt.weight")
        writer.gguf.add_tensor(f"{block}.ssm_a", -np.ones((inner, state), np.float32))
        writer.noise((EMBEDDING, inner), f"{block}.ssm_out.weight")
    writer.save()


def bert(path: Path, pooling: gguf.PoolingType = gguf.PoolingType.MEAN) -> None:
    """An embedding model: no causal attention, no memory of tokens, nothing to generate with."""
    writer = Writer(path, "bert", layers=1, context=256)
    writer.gguf.add_head_count(HEADS)
    writer.gguf.add_layer_norm_eps(1e-12)
    writer.gguf.add_causal_attention(False)
    writer.gguf.add_pooling_type(pooling)
    letters = [chr(code) for code in range(0x21, 0x7F)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *(f"\u2581{letter}" for letter in letters), *(f"##{letter}" for letter in letters)]
    writer.tokens("bert", tokens, [NORMAL] * len(tokens))
    writer.gguf.add_tokenizer_pre("default")
    writer.gguf.add_token_type_count(2)
    writer.gguf.add_pad_token_id(0)
    writer.gguf.add_unk_token_id(1)
    writer.gguf.add_bos_token_id(2)
    writer.gguf.add_sep_token_id(3)
    writer.gguf.add_mask_token_id(4)
    writer.noise((len(tokens), EMBEDDING), "token_embd.weight")
    writer.noise((2, EMBEDDING), "token_types.weight")
    writer.noise((256, EMBEDDING), "position_embd.weight")
    writer.attention("blk.0")
    writer.noise((HIDDEN, EMBEDDING), "blk.0.ffn_up.weight")
    writer.noise((EMBEDDING, HIDDEN), "blk.0.ffn_down.weight")
    writer.noise((HIDDEN,), "blk.0.ffn_up.bias")
    norms = ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm")
    writer.ones(*(f"{name}.weight" for name in norms))
    if pooling == gguf.PoolingType.RANK:
        writer.noise((EMBEDDING, EMBEDDING), "cls.weight")
        writer.noise((1, EMBEDDING), "cls.output.weight")
        writer.noise((EMBEDDING,), "cls.bias")
    biased = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
    writer.noise((EMBEDDING,), *(f"{name}.bias" for name in norms), *(f"blk.0.{name}.bias" for name in biased))
    writer.save()


def t5(path: Path) -> None:
    """Encoder and decoder: one network reads the prompt, another writes the answer."""
    writer = Writer(path, "t5", layers=1, context=512)
    n_vocab = bytes_only(writer)
    _heads(writer)
    writer.gguf.add_key_length(EMBEDDING // HEADS)
    writer.gguf.add_value_length(EMBEDDING // HEADS)
    writer.gguf.add_relative_attn_buckets_count(32)
    writer.gguf.add_decoder_start_token_id(0)
    writer.noise((n_vocab, EMBEDDING), "token_embd.weight")
    for side in ("enc", "dec"):
        writer.ones(f"{side}.output_norm.weight", f"{side}.blk.0.attn_norm.weight", f"{side}.blk.0.ffn_norm.weight")
        writer.noise((32, HEADS), f"{side}.blk.0.attn_rel_b.weight")
        writer.noise((EMBEDDING, EMBEDDING), *(f"{side}.blk.0.attn_{name}.weight" for name in "qkvo"))
        writer.feed_forward(f"{side}.blk.0")
    writer.ones("dec.blk.0.cross_attn_norm.weight")
    writer.noise((EMBEDDING, EMBEDDING), *(f"dec.blk.0.cross_attn_{name}.weight" for name in "qkvo"))
    writer.save()


def _heads(writer: Writer, kv: int | list[int] = HEADS) -> None:
    writer.gguf.add_head_count(HEADS)
    writer.gguf.add_head_count_kv(kv)
    writer.gguf.add_layer_norm_rms_eps(1e-5)


KINDS: dict[str, Callable[[Path], None]] = {
    "llama": llama,  # 259 tokens
    "llama-49k": lambda path: llama(path, lambda writer: bytes_only(writer, size=49_152)),
    "llama-262k": lambda path: llama(path, lambda writer: bytes_only(writer, size=262_144)),
    "gemma": gemma,
    "lfm2": lfm2,
    "mamba": mamba,
    "control": lambda path: llama(path, byte_pairs, CHATML),  # control tokens, some of them user-defined
    "infill": lambda path: llama(path, lambda writer: byte_pairs(writer, (*CONTROL, *INFILL)), CHATML),
    "infill-plain": lambda path: llama(path, lambda writer: byte_pairs(writer, (*CONTROL, *INFILL[:3])), CHATML),
    "spaced": lambda path: llama(  # a space goes before each text, as in Llama 2
        path, lambda writer: bytes_only(writer, control=("[INST]", "[/INST]"), space_prefix=True), LLAMA_2
    ),
    "bert": bert,
    "bert-cls": lambda path: bert(path, gguf.PoolingType.CLS),
    "bert-rank": lambda path: bert(path, gguf.PoolingType.RANK),  # scores a pair of texts
    "llama-last": llama_last,
    "llama-bidirectional": llama_bidirectional,
    "t5": t5,
    "llada": llada,
}


def make(kind: str, folder: Path) -> Path:
    """Write `<kind>.gguf` into `folder` and return its path."""
    path = folder / f"{kind}.gguf"
    KINDS[kind](path)
    return path
