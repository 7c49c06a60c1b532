"""Count the CPUs that this process may use, which is how many threads llama.cpp should compute with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MB_PER_VCPU = 1769  # Lambda: "at 1,769 MB, a function has the equivalent of one vCPU"


def available(environ: Mapping[str, str] = os.environ, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the process's CPU affinity, limited by the cgroup's quota and on Lambda by memory / 1769 MB. At least 1.

    Extra threads only wait at ggml's barriers, so both limits are rounded to the nearest integer.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    cpus = min(cpus, _quota(cgroup))
    memory = environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    if memory.isdigit():
        cpus = min(cpus, int(memory) / MB_PER_VCPU)
    return max(1, round(cpus))


def _quota(cgroup: Path) -> float:
    """Return the CPUs of the cgroup's quota (v2 `cpu.max`, v1 `cpu.cfs_quota_us`), infinity without one."""
    try:
        quota, _, period = (cgroup / "cpu.max").read_text().partition(" ")
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return float("inf") if limit <= 0 else limit / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return float("inf")
