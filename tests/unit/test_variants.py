"""The chosen build of ggml's CPU backend is the one that ggml would choose."""

from __future__ import annotations

import pytest

from core.engine.variants import X86, best, cpu_flags

FILES = [f"libggml-cpu-{name}.so" for name in X86]
BASE = "fpu sse sse2 sse4_1 sse4_2 avx f16c fma avx2 bmi1 bmi2"
WIDE = f"{BASE} avx512f avx512dq avx512cd avx512bw avx512vl"

# ggml-cpu/arch/x86/cpu-feats.cpp: each flag's part of a variant's score. A variant needs all of its flags.
SCORE = {
    "fma": 1,
    "f16c": 2,
    "sse4_2": 4,
    "bmi2": 8,
    "avx": 16,
    "avx2": 32,
    "avx_vnni": 64,
    "avx512f": 128,
    "avx512vbmi": 256,
    "avx512_bf16": 512,
    "avx512_vnni": 1024,
    "amx_int8": 2048,
}


def info(flags: str) -> str:
    return f"processor\t: 0\nmodel name\t: x\nflags\t\t: {flags}\nbugs\t\t: y\n\nprocessor\t: 1\nflags\t\t: none\n"


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        (BASE, "haswell"),  # AMD EPYC 7002 and 7003 on Lambda
        (WIDE, "skylakex"),
        (f"{WIDE} avx512_vnni", "cascadelake"),
        (f"{WIDE} avx512_vnni avx512vbmi", "icelake"),
        (f"{WIDE} avx512_vnni avx512vbmi avx512_bf16", "zen4"),
        (f"{WIDE} avx512_vnni avx512vbmi avx512_bf16 amx_tile amx_int8", "sapphirerapids"),
        ("fpu sse4_2 avx", "sandybridge"),
        ("fpu sse2", "x64"),
    ],
)
def test_the_best_supported_variant_is_chosen(flags: str, variant: str) -> None:
    """The flags are those of the first processor."""
    assert best(FILES, cpu_flags(info(flags))) == f"libggml-cpu-{variant}.so"


def test_the_order_matches_ggmls_scores() -> None:
    """The first supported variant has the highest score."""
    scores = [sum(SCORE.get(flag, 0) for flag in needed) for needed in X86.values()]

    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_only_installed_variants_are_chosen() -> None:
    """An older compiler builds fewer variants."""
    assert best(["libggml-cpu-haswell.so", "libggml-cpu-x64.so"], cpu_flags(info(WIDE))) == "libggml-cpu-haswell.so"
    assert best(["libggml-cpu-haswell.so"], cpu_flags(info("sse2"))) is None


@pytest.mark.parametrize(
    ("files", "cpuinfo"),
    [
        ([*FILES, "libggml-cpu-zen9.so"], info(WIDE)),
        (["libggml-cpu-armv8.2_1.so"], "processor : 0\nFeatures : fp asimd\n"),
        (FILES, ""),
    ],
    ids=["unknown variant", "arm", "no flags"],
)
def test_ggml_chooses_if_a_variant_is_unknown(files: list[str], cpuinfo: str) -> None:
    """A new version of llama.cpp may bring variants that this table does not have."""
    assert best(files, cpu_flags(cpuinfo)) is None
