"""Measure the Lambda runtime's cost per invocation, compared with awslambdaric + Mangum, and per chunk of a stream.

    python -m infra.bench lambda_overhead [--invocations N] [--chunks N]

Under Amazon's emulator, the same small Starlette application runs under awslambdaric + Mangum (lifespan off), under our
runtime with buffered answers, and with streamed ones. Each has its own emulator, and they are invoked in turn, so that
other load on the machine affects all of them. The result is the emulator's own Duration of each invocation. With our
Runtime API emulator, the benchmark measures the time from the event to the first chunk, and the time per chunk in a
stream without pauses. Prints one JSON line per measurement. The exit status is 1 if a target is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from infra.bench.process import environment
from infra.bench.report import Goal, spread
from infra.emulator.event import to_event
from infra.emulator.rie import Emulator
from infra.emulator.runtime_api import RuntimeAPIServer

ROOT = Path(__file__).parents[2]
RIC = "awslambdaric==4.2.2"
WARM_UP = 20

OVERHEAD = Goal("most", 1.2)  # ours / awslambdaric + Mangum
FIRST_BYTE_MS = Goal("most", 1.5)
CHUNK_US = Goal("most", 50.0)

APPLICATION = """
import asyncio
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

FRAME = b'{"choices":[{"index":0,"delta":{"content":" token"}}],"number":%d}'

async def tiny(request):
    return JSONResponse({"ok": True})

async def events(request):
    count, pause = int(request.query_params["count"]), float(request.query_params["pause"])
    async def frames():
        for number in range(count):
            yield b"data: " + FRAME % number + b"\\n\\n"
            if pause:
                await asyncio.sleep(pause)
    return StreamingResponse(frames(), media_type="text/event-stream")

app = Starlette(routes=[Route("/tiny", tiny), Route("/events", events)])
"""
OURS = f"""{APPLICATION}
import os, sys
from adapters.aws_lambda.runtime import Runtime
sys.exit(asyncio.run(Runtime(app, os.environ, mode=os.environ["RESPONSE_MODE"]).run()))
"""
THEIRS = f"""{APPLICATION}
import sys, types
from mangum import Mangum
sys.modules["bench_app"] = module = types.ModuleType("bench_app")
module.handler = Mangum(app, lifespan="off")
sys.argv = ["awslambdaric", "bench_app.handler"]
from awslambdaric.__main__ import main
main(sys.argv)
"""


def ric_python() -> Path:
    """Return the interpreter of an environment with awslambdaric. The first call creates it.

    Mangum and Starlette come from our environment.
    """
    home = ROOT / "build" / "bench-ric"
    python, complete = home / "bin" / "python", home / RIC
    if not complete.exists():
        print(f"making {home.relative_to(ROOT)} for {RIC}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", RIC]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        complete.touch()
    return python


def under_emulator(invocations: int) -> dict[str, list[float]]:
    """Return the emulator's Duration of each invocation in ms, by runtime."""
    event = json.dumps(to_event("GET", "/tiny", headers=[("accept", "application/json")])).encode()
    base = environment({"PYTHONPATH": str(ROOT), "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "3008"})
    commands = {
        "awslambdaric+mangum": ([str(ric_python()), "-c", THEIRS], {"_HANDLER": "bench_app.handler"}),
        "buffered": ([sys.executable, "-c", OURS], {"RESPONSE_MODE": "buffered"}),
        "streamed": ([sys.executable, "-c", OURS], {"RESPONSE_MODE": "response_stream"}),
    }
    emulators = {name: Emulator(command, {**base, **extra}) for name, (command, extra) in commands.items()}
    try:
        for emulator in emulators.values():
            emulator.__enter__()
        for _ in range(WARM_UP + invocations):
            for name, emulator in emulators.items():
                status, payload = emulator.invoke(event)
                if status != 200 or b"ok" not in payload:
                    raise RuntimeError(f"{name} answered {status}: {payload[:300]!r}\n{emulator.printed()[-2000:]}")
        durations = {name: _durations(emulator.printed())[WARM_UP:] for name, emulator in emulators.items()}
    finally:
        for emulator in emulators.values():
            emulator.close()
    return durations


def _durations(log: str) -> list[float]:
    return [float(number) for number in re.findall(r"REPORT RequestId: \S+.*?\bDuration: ([\d.]+) ms", log)]


async def with_our_emulator(invocations: int, chunks: int) -> tuple[list[float], list[float]]:
    """Return ms from the event to the first chunk, and µs per chunk in streams without pauses."""
    paced = to_event("GET", "/events", query="count=10&pause=0.005")
    rushed = to_event("GET", "/events", query=f"count={chunks}&pause=0")
    async with RuntimeAPIServer() as server:
        environ = environment(
            {"PYTHONPATH": str(ROOT), "AWS_LAMBDA_RUNTIME_API": server.address, "RESPONSE_MODE": "auto"}
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", OURS, env=environ)
        try:
            first: list[float] = []
            for _ in range(WARM_UP + invocations):
                exchange = server.invoke(paced)
                await exchange.finished.wait()
                assert exchange.handed_out is not None
                first.append((exchange.chunks[0][0] - exchange.handed_out) * 1e3)
            each: list[float] = []
            for _ in range(7):
                exchange = server.invoke(rushed)
                await exchange.finished.wait()
                each.append((exchange.chunks[-1][0] - exchange.chunks[0][0]) / (len(exchange.chunks) - 1) * 1e6)
        finally:
            process.terminate()
            await process.wait()
    if server.violations:
        raise RuntimeError(f"violations of the Runtime API: {server.violations[:3]}")
    return first[WARM_UP:], each[1:]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench lambda_overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--invocations", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=5000)
    options = parser.parse_args(argv)

    durations = under_emulator(options.invocations)
    theirs = median(durations["awslambdaric+mangum"])
    good = True
    for name, values in durations.items():
        line: dict[str, Any] = {"measure": "emulator_duration_ms", "runtime": name, **spread(values)}
        if name != "awslambdaric+mangum":
            good &= _judge(line, median(values) / theirs, OVERHEAD)
        print(json.dumps(line))
    first, each = asyncio.run(with_our_emulator(options.invocations, options.chunks))
    for measure, values, goal in (("first_chunk_ms", first, FIRST_BYTE_MS), ("chunk_us", each, CHUNK_US)):
        line = {"measure": measure, "runtime": "streamed", **spread(values)}
        good &= _judge(line, median(values), goal)
        print(json.dumps(line))
    return 0 if good else 1


def _judge(line: dict[str, Any], value: float, goal: Goal) -> bool:
    """Add the value and its target to the line. Return whether the target is met."""
    line |= {"value": round(value, 3), "goal": str(goal), "met": goal.met(value)}
    return goal.met(value)
