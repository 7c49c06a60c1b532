"""What the Lambda runtime costs for each invocation, beside awslambdaric + Mangum, and for each chunk of a stream.

    python -m infra.bench lambda_overhead [--invocations N] [--chunks N]

Under Amazon's emulator: the same small Starlette application under awslambdaric + Mangum (lifespan off), under our
runtime buffered, and streamed; one emulator each, invoked in turn, so that what slows the machine slows all. Timed is
the emulator's own Duration of each invocation. At the Runtime API double: from the event to the first chunk, and the
wall time of a chunk in a stream without pauses. One JSON line each; exit status 1 if a goal is missed.
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
    """The interpreter of an environment with awslambdaric, Mangum and Starlette being our own; made at first use."""
    home = ROOT / "build" / "bench-ric"
    python, done = home / "bin" / "python", home / RIC
    if not done.exists():
        print(f"making {home.relative_to(ROOT)} for {RIC}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", RIC]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        done.touch()
    return python


def under_emulator(invocations: int) -> dict[str, list[float]]:
    """The emulator's Duration of each invocation in ms, by runtime."""
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
        found = {name: _durations(emulator.printed())[WARM_UP:] for name, emulator in emulators.items()}
    finally:
        for emulator in emulators.values():
            emulator.close()
    return found


def _durations(log: str) -> list[float]:
    return [float(number) for number in re.findall(r"REPORT RequestId: \S+.*?\bDuration: ([\d.]+) ms", log)]


async def at_the_double(invocations: int, chunks: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the event to the first chunk, and microseconds for each chunk of streams without pauses."""
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
    given = parser.parse_args(argv)

    durations = under_emulator(given.invocations)
    theirs = median(durations["awslambdaric+mangum"])
    good = True
    for name, values in durations.items():
        line: dict[str, Any] = {"measure": "emulator_duration_ms", "runtime": name, **spread(values)}
        if name != "awslambdaric+mangum":
            good &= _held(line, median(values) / theirs, OVERHEAD)
        print(json.dumps(line))
    first, each = asyncio.run(at_the_double(given.invocations, given.chunks))
    for measure, values, goal in (("first_chunk_ms", first, FIRST_BYTE_MS), ("chunk_us", each, CHUNK_US)):
        line = {"measure": measure, "runtime": "streamed", **spread(values)}
        good &= _held(line, median(values), goal)
        print(json.dumps(line))
    return 0 if good else 1


def _held(line: dict[str, Any], value: float, goal: Goal) -> bool:
    line |= {"value": round(value, 3), "goal": str(goal), "met": goal.met(value)}
    return goal.met(value)
