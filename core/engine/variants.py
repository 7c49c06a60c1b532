"""Choose the build of ggml's CPU backend for this machine, by file names and /proc/cpuinfo.

ggml itself opens each of the fourteen shared objects to ask for its score. In a Lambda image, whose blocks are fetched
when they are first read, that is at least one round trip each. Measured with twelve variants on a file system that
takes 4 ms a read: 43 ms for the best one, 294 ms for all; from the page cache 13 and 27 ms.
"""

from __future__ import annotations

from collections.abc import Iterable

_AVX2 = ("sse4_2", "avx", "f16c", "fma", "avx2", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")

# As in ggml/src/CMakeLists.txt (ggml_add_cpu_backend_variant), with Linux's names of the flags. Best first, by the
# score in ggml-cpu/arch/x86/cpu-feats.cpp.
X86: dict[str, tuple[str, ...]] = {
    "sapphirerapids": (*_AVX512, "avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_int8", "amx_tile"),
    "zen4": (*_AVX512, "avx512_vnni", "avx512_bf16", "avx512vbmi"),
    "cooperlake": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "icelake": (*_AVX512, "avx512_vnni", "avx512vbmi"),
    "cascadelake": (*_AVX512, "avx512_vnni"),
    "cannonlake": (*_AVX512, "avx512vbmi"),
    "skylakex": _AVX512,
    "alderlake": (*_AVX2, "avx_vnni"),
    "haswell": _AVX2,
    "piledriver": ("sse4_2", "avx", "f16c", "fma"),
    "ivybridge": ("sse4_2", "avx", "f16c"),
    "sandybridge": ("sse4_2", "avx"),
    "sse42": ("sse4_2",),
    "x64": (),
}


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags of the first processor in /proc/cpuinfo's text, none where the line has another name (arm)."""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def best(files: Iterable[str], flags: frozenset[str]) -> str | None:
    """Return the file name of the best variant. None means to let ggml choose: a file is unknown, or no flags are."""
    variants = {name.removeprefix("libggml-cpu-").removesuffix(".so"): name for name in files}
    if not flags or not variants.keys() <= X86.keys():
        return None
    return next((variants[name] for name, needed in X86.items() if name in variants and flags.issuperset(needed)), None)
