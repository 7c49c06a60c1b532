"""`cpus.available` counts the CPUs that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.engine import cpus

CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpu_max", "expected"), [("max 100000", CPUS), ("50000 100000", 1), ("100000 100000", 1), ("garbage", CPUS)]
)
def test_the_cgroup_quota_counts(tmp_path: Path, cpu_max: str, expected: int) -> None:
    """A quota of half a CPU gives one thread; without a readable quota all CPUs count."""
    (tmp_path / "cpu.max").write_text(cpu_max)

    assert expected == cpus.available({}, tmp_path)


def test_a_cgroup_v1_quota_counts(tmp_path: Path) -> None:
    """cgroup v1 has quota and period in two files."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")

    assert cpus.available({}, tmp_path) == 1


@pytest.mark.parametrize(("memory", "expected"), [("512", 1), ("1769", 1), ("10240", min(CPUS, 6))])
def test_lambda_memory_counts(tmp_path: Path, memory: str, expected: int) -> None:
    """Lambda gives one vCPU per 1,769 MB, although the process sees more."""
    assert expected == cpus.available({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": memory}, tmp_path)
