"""An execution environment: one runtime process and its Runtime API, started, frozen and killed as on Lambda.

Emulated: init within 10 s or again inside the first invocation, one event at a time, SIGSTOP between events, the
kill at the deadline, a fresh process after a crash. Not emulated: CPU shares, network, IAM, the memory limit.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from infra.emulator.exchange import Exchange
from infra.emulator.runtime_api import RuntimeAPIServer

INIT_LIMIT_S = 10.0
_ERROR_TYPE = "lambda-runtime-function-error-type"


@dataclass(frozen=True, slots=True)
class Report:
    """The values of CloudWatch's REPORT line, and the time to the first byte."""

    request_id: str
    init_ms: float | None  # only of the first invocation of a process
    ttft_ms: float | None
    duration_ms: float
    memory_mb: int
    max_memory_mb: int
    error: str | None

    @property
    def billed_gb_s(self) -> float:
        """Billed GB-seconds. Init is billed too (since August 2025), and milliseconds are rounded up."""
        return ceil(self.duration_ms + (self.init_ms or 0)) / 1000 * self.memory_mb / 1024

    def __str__(self) -> str:
        parts = [
            f"request={self.request_id}",
            f"init={self.init_ms:.0f}ms" if self.init_ms is not None else "init=-",
            f"ttft={self.ttft_ms:.0f}ms" if self.ttft_ms is not None else "ttft=-",
            f"duration={self.duration_ms:.0f}ms",
            f"memory={self.max_memory_mb}/{self.memory_mb}MB",
            f"billed={self.billed_gb_s:.3f}GB-s",
        ]
        return " ".join([*parts, *([f"error={self.error}"] if self.error else [])])


class Environment:
    """Await `invoke(event)`, read the Exchange to its end, then await `settle(exchange)` for the Report."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        memory_mb: int = 3008,
        timeout_s: float = 300.0,
        freeze: bool = True,
    ) -> None:
        self.violations: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._environ = environ
        self._memory_mb = memory_mb
        self._timeout_s = timeout_s
        self._freeze = freeze
        self._server: RuntimeAPIServer | None = None
        self._began = 0.0
        self._init_ms: float | None = None
        self._watch: asyncio.Task[None] | None = None

    async def invoke(self, event: Any) -> Exchange:
        """Start or thaw the process and send it the event. The answer arrives in `exchange.data`."""
        if self.process is None or self.process.returncode is not None:
            await self._start()
            if not await self._initialised():
                await self.close()
                await self._start()  # as on Lambda: init runs again, within the invocation's time
        self._signal(signal.SIGCONT)
        assert self._server is not None
        exchange = self._server.invoke(event, timeout_s=self._timeout_s, keep=False)
        self._watch = asyncio.create_task(self._guard(exchange))
        return exchange

    async def settle(self, exchange: Exchange, first_byte: float | None) -> Report:
        """Wait until the process polls for another event, freeze it, and return a report. `first_byte` is monotonic."""
        assert self.process is not None
        assert self._server is not None
        assert self._watch is not None
        ended = time.monotonic()
        exited = asyncio.create_task(self.process.wait())
        idle = asyncio.create_task(self._server.idle.wait())
        await asyncio.wait({exited, idle, self._watch}, return_when=asyncio.FIRST_COMPLETED)
        for task in (exited, idle):
            task.cancel()
        ended = max(ended, time.monotonic()) if self.process.returncode is None else ended
        self._watch.cancel()
        peak = self._peak_mb()
        if self._freeze and self._server.idle.is_set():
            self._signal(signal.SIGSTOP)
        self.violations, self._server.violations = self.violations + self._server.violations, []
        began = exchange.deadline - self._timeout_s
        init, self._init_ms = self._init_ms, None
        return Report(
            request_id=exchange.id,
            init_ms=init,
            ttft_ms=None if first_byte is None else (first_byte - began) * 1e3,
            duration_ms=(ended - began) * 1e3,
            memory_mb=self._memory_mb,
            max_memory_mb=peak,
            error=exchange.error["errorType"] if exchange.error else exchange.trailers.get(_ERROR_TYPE),
        )

    async def close(self) -> None:
        """Kill the process."""
        if self._watch is not None:
            self._watch.cancel()
        if self.process is not None and self.process.returncode is None:
            self._signal(signal.SIGKILL)
            await self.process.wait()
        if self._server is not None:
            await self._server.__aexit__()
        self._server = None

    async def _start(self) -> None:
        await self.close()
        self._server = await RuntimeAPIServer().__aenter__()
        environ = {
            "AWS_LAMBDA_FUNCTION_NAME": "local",
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(self._memory_mb),
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            "AWS_REGION": "eu-central-1",
            **self._environ,
            "AWS_LAMBDA_RUNTIME_API": self._server.address,
        }
        self._began = time.monotonic()
        self.process = await asyncio.create_subprocess_exec(*self._command, env=environ)

    async def _initialised(self) -> bool:
        """Return False if init took too long. `_guard` handles a process that has exited."""
        assert self.process is not None
        assert self._server is not None
        exited = asyncio.create_task(self.process.wait())
        polled = asyncio.create_task(self._server.polled.wait())
        done, _ = await asyncio.wait({exited, polled}, timeout=INIT_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (exited, polled):
            task.cancel()
        self._init_ms = (time.monotonic() - self._began) * 1e3
        return bool(done)

    async def _guard(self, exchange: Exchange) -> None:
        """Enforce the deadline and watch for the process's exit."""
        assert self.process is not None
        assert self._server is not None
        exited = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({exited}, timeout=exchange.deadline - time.monotonic())
        finally:
            exited.cancel()
        if self.process.returncode is None:
            self._signal(signal.SIGKILL)
            await self.process.wait()
            exchange.fail("Sandbox.Timedout", f"Task timed out after {self._timeout_s:.2f} seconds")
        elif self._server.init_errors:
            error = self._server.init_errors[-1]
            exchange.fail(error["errorType"], error["errorMessage"])
        else:
            exchange.fail("Runtime.ExitError", f"Runtime exited with status {self.process.returncode}")

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, number)

    def _peak_mb(self) -> int:
        assert self.process is not None
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024 if "VmHWM:" in status else 0
