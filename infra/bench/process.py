"""Start a server, time its first token, read its peak memory and stop it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from infra.bench.client import Answer, RequestFailed, stream
from infra.bench.contender import ROOT, Contender
from infra.free_port import free_port

START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
POLL_S = 0.002
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


class StartFailed(RuntimeError):
    """A server exited or did not answer in time. The message has its last output."""


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return a minimal environment, so that variables of the caller's shell do not affect one server only."""
    inherited = {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("OMP_")}
    return inherited | dict(extra)


class Process:
    """A server process. As a context manager, it stops the server with SIGTERM, and with SIGKILL after 15 s."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.port = free_port()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._popen: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def start(self, body: Mapping[str, object]) -> tuple[float, Answer]:
        """Start the server and request `body`. Return the seconds until the first delta with content, and the answer.

        The request is tried every 2 ms until the server accepts it. Raise StartFailed.
        """
        begun = time.monotonic()
        self._popen = subprocess.Popen(
            self.contender.command(self.port),
            cwd=ROOT,
            env=environment(self.contender.environment(self.port)),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        reason = "it is not listening"
        while True:
            if self._popen.poll() is not None:
                raise StartFailed(f"{self.contender.name} exited with status {self._popen.returncode}:\n{self.log()}")
            if time.monotonic() - begun > START_LIMIT_S:
                raise StartFailed(f"{self.contender.name} did not answer within {START_LIMIT_S:g} s: {reason}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                answer = stream(self.port, body)
            except (OSError, RequestFailed) as error:  # not listening yet, or listening but still loading (503)
                if isinstance(error, RequestFailed) and "status 503" not in str(error):
                    raise StartFailed(f"{self.contender.name}: {error}\n{self.log()}") from error
                reason = str(error)
                time.sleep(POLL_S)
            else:
                return answer.begun + answer.first - begun, answer

    def peak_memory_mib(self) -> float:
        """Return the peak resident memory (VmHWM) in MiB, including the mapped model file."""
        assert self._popen is not None
        for line in Path(f"/proc/{self._popen.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise OSError("/proc/PID/status has no VmHWM: peak memory can be measured on Linux only")

    def log(self) -> str:
        """Return the last 25 lines of the server's output."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode("utf-8", "replace").splitlines()[-25:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop()
        finally:
            self._log.close()

    def _stop(self) -> None:
        if self._popen is None or self._popen.poll() is not None:
            return
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.contender.name} ignored SIGTERM for {STOP_LIMIT_S:g} s and was killed", file=sys.stderr)
            self._popen.kill()
            self._popen.wait()
