"""Benchmarks. `python -m infra.bench NAME` runs one."""
