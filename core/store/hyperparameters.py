"""Check a model's hyperparameters against the assertions of llama.cpp.

Most wrong values make llama.cpp throw, which becomes an error at load. The ones checked here fail an assertion
(load_hparams in llama-model.cpp, llama-cpp-python 0.3.36), which ends the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
# Their products are computed in 32 bits: 2147483650 key heads of 16 pass every comparison there, as 2, and are asserted
# on in the first graph. Real models stay below by a factor of ten and more.
BOUNDS = {
    "embedding_length": 1 << 17,
    "attention.head_count": 1 << 13,
    "attention.head_count_kv": 1 << 13,
    "attention.key_length": 1 << 14,
    "attention.value_length": 1 << 14,
    "rope.dimension_count": 1 << 14,
}
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon")
ROPE_SCALING = ("none", "linear", "yarn", "longrope")


def find_fault(metadata: Mapping[str, Any], architecture: str) -> str | None:
    """Return the fault, completing "<file> ...", or None. Missing keys and arrays (one value per layer) pass."""

    def whole(name: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{name}", default)
        return value if isinstance(value, int) else default

    layers = whole("block_count", 1)
    if not 1 <= layers <= MAX_LAYERS:
        return f"claims {layers} layers; 1 to {MAX_LAYERS} can be loaded"
    if (predicting := whole("nextn_predict_layers", 0)) > layers:
        return f"claims {predicting} prediction layers of {layers}"
    if (scaling := metadata.get(f"{architecture}.rope.scaling.type", "linear")) not in ROPE_SCALING:
        return f"has rope scaling {scaling!r:.40}; {', '.join(ROPE_SCALING)} are known"
    for name, most in BOUNDS.items():
        if (value := whole(name, 0)) > most:
            return f"has {architecture}.{name} = {value}; up to {most} can be right"
    for name in EPSILONS:
        epsilon = metadata.get(f"{architecture}.{name}", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon <= 1:  # also NaN
            return f"has {architecture}.{name} = {epsilon:g}; 0 to 1 can be right"
    return _find_expert_fault(
        whole("expert_count", 0),
        metadata.get(f"{architecture}.expert_used_count", 0),
        whole("expert_group_count", 0),
        whole("expert_group_used_count", 0),
    )


def _find_expert_fault(experts: int, used: Any, groups: int, groups_used: int) -> str | None:
    if experts > MAX_EXPERTS:
        return f"claims {experts} experts; up to {MAX_EXPERTS} can be loaded"
    if isinstance(used, int) and (used > experts or (used == 0) != (experts == 0)):
        return f"uses {used} of {experts} experts"
    if groups and groups >= experts:
        return f"has {groups} groups of {experts} experts"
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        return f"uses {groups_used} of {groups} groups of {experts} experts"
    return None
