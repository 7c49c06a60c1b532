"""Download Amazon's Runtime Interface Emulator from the aws-sam-cli wheel (`make rie`), and run it.

The emulator buffers every answer and returns the whole payload, for a stream with its prelude and NULs. Two invocations
at once crash it, so `Emulator.invoke` must not be called concurrently.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

WHEEL = "aws-sam-cli==1.170.0"
BUILD = Path(__file__).parents[2] / "build"
SHA256 = {
    "x86_64": "6b1e686e62ab2baf5759c412c4864276ef2a88b094fca53ec070637ccba9b9a5",
    "arm64": "ec2e5d09633d853834c008b1ef264bf834b258a94d551d2b2074966494b39a21",
}


def fetch() -> Path:
    """Return the path of the emulator. The first call downloads it. Raises RuntimeError if that fails."""
    machine = "arm64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
    target = BUILD / f"aws-lambda-rie-{machine}"
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("aws_sam_cli-*.whl"))
        if ended.returncode != 0 or not wheels:
            raise RuntimeError(f"{WHEEL}, which contains the emulator, cannot be downloaded:\n{ended.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            binary = wheel.read(f"samcli/local/rapid/aws-lambda-rie-{machine}")
        if hashlib.sha256(binary).hexdigest() != SHA256[machine]:
            raise RuntimeError(f"The emulator in {WHEEL} does not have the expected SHA-256 {SHA256[machine]}.")
        unpacked = Path(folder) / "rie"
        unpacked.write_bytes(binary)
        unpacked.chmod(0o755)
        unpacked.replace(target)
    return target


class Emulator:
    """A runtime under the emulator. The process starts with the first invocation, or again after a crash."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, timeout_s: int = 60) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.port, api = _free_ports()
        self._timeout_s = timeout_s
        addresses = ["--runtime-interface-emulator-address", f"127.0.0.1:{self.port}"]
        addresses += ["--runtime-api-address", f"127.0.0.1:{api}"]
        self._process = subprocess.Popen(
            [str(fetch()), "--log-level", "info", *addresses, *command],
            env={"PATH": os.environ["PATH"], "AWS_LAMBDA_FUNCTION_TIMEOUT": str(timeout_s), **environ},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def __enter__(self) -> Emulator:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.02)
        self.close()
        raise RuntimeError("The emulator did not open its port.")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the emulator, which stops the runtime."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()

    def invoke(self, event: bytes) -> tuple[int, bytes]:
        """Return status and payload. Waits for the whole answer, because an abandoned one would crash the emulator."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=self._timeout_s + 30)
        try:
            connection.request("POST", "/2015-03-31/functions/function/invocations", event)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def printed(self) -> str:
        """Return what the emulator and the runtime have printed so far."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


def _free_ports() -> tuple[int, int]:
    """Return two free ports below 32768. The kernel does not assign these to a process that binds port 0."""
    free = []
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == 2:
            return free[0], free[1]
    raise RuntimeError("No two of 100 ports on 127.0.0.1 are free.")


if __name__ == "__main__":
    try:
        print(fetch())
    except RuntimeError as error:
        sys.exit(str(error))
