"""The baseline servers: other OpenAI-compatible servers that run llama.cpp, measured with the same model."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infra.bench.contender import ROOT, Load, json_schema_format

PEER = "llama_cpp.server"
ENVIRONMENT = ROOT / "build" / "bench-peer"


def peer_python() -> Path:
    """Return the interpreter of an environment with `llama_cpp.server`. The first call creates it in 10-20 s.

    Only the server's web packages are installed there. A .pth file adds llama-cpp-python from our environment, so that
    nothing is compiled twice and both servers run the same libllama.
    Raise subprocess.CalledProcessError if pip fails.
    """
    python = ENVIRONMENT / "bin" / "python"
    complete = ENVIRONMENT / f"llama-cpp-python-{version('llama-cpp-python')}"
    if not complete.exists():
        print(f"creating {ENVIRONMENT.relative_to(ROOT)} for python -m llama_cpp.server", file=sys.stderr)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT)}))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        requirement = f"llama-cpp-python[server]=={version('llama-cpp-python')}"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        complete.touch()
    return python


@dataclass(frozen=True, slots=True)
class LlamaCppServer:
    """`python -m llama_cpp.server`, the usual way to serve a GGUF file from Python.

    If `tuned`, it has our context, batch and threads, and three options whose defaults are slow: no logits of prompt
    tokens (`logits_all`), no timing report per answer (`verbose`), and a second request does not interrupt a running
    stream (`interrupt_requests`). Otherwise it has its defaults, such as 1 thread on 2 cores.
    """

    load: Load
    python: Path
    tuned: bool = True

    @property
    def name(self) -> str:
        return PEER if self.tuned else f"{PEER} (defaults)"

    def command(self, port: int) -> list[str]:
        command = [str(self.python), "-m", "llama_cpp.server", "--model", str(self.load.model)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if self.tuned:
            command += ["--n_ctx", str(self.load.n_ctx), "--n_batch", str(self.load.n_batch)]
            command += ["--n_threads", str(self.load.n_threads), "--n_threads_batch", str(self.load.n_threads)]
            command += ["--logits_all", "false", "--verbose", "false", "--interrupt_requests", "false"]
        return command

    def environment(self, port: int) -> dict[str, str]:
        return {}

    def response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "json_object", "schema": schema}  # its own format; it compiles the schema to GBNF


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama.cpp's C++ `llama-server`. The user of the benchmark builds it."""

    load: Load
    binary: Path
    name: str = "llama-server"

    def command(self, port: int) -> list[str]:
        command = [str(self.binary), "--model", str(self.load.model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--ctx-size", str(self.load.n_ctx), "--batch-size", str(self.load.n_batch)]
        command += ["--threads", str(self.load.n_threads), "--parallel", str(self.load.n_parallel), "--kv-unified"]
        return command

    def environment(self, port: int) -> dict[str, str]:
        return {}

    def response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        return json_schema_format(schema)


def check_llama_server(binary: Path) -> None:
    """Raise FileNotFoundError with advice if `binary` does not exist."""
    if not binary.is_file():
        raise FileNotFoundError(
            f"There is no llama-server at {binary}. Build llama.cpp's target llama-server, then pass its path."
        )
