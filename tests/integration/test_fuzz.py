"""Schemathesis sends what /openapi.json allows, and what it does not, to a live server with a tiny model.

All its checks hold: no 500, no status, content type or body that the document does not describe, no invalid request
accepted, no method without a 405 and its Allow header, no key forgotten. `make fuzz` runs all its phases with at least
5,000 cases; FUZZ_EXAMPLES is the number of cases for each operation and phase.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.wiring import build
from core.settings import Settings, keys
from handlers.operations import OPERATIONS
from tests.conftest import MakeModel
from tests.integration.hub_double import HubDouble, Repo
from tests.serving import serving

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
CASES = 5000 if EXAMPLES else 500


@pytest.fixture
def address(tiny: MakeModel, tmp_path: Path) -> Iterator[str]:
    """Serve a tiny model. /load finds the repository of the document's example, and nothing else."""
    path = tiny("infill")
    with HubDouble({"org/repo": Repo({"file.gguf": path.read_bytes()})}) as hub:
        settings = Settings(
            models_dir=tmp_path,
            model_path=str(path),
            embedding_model_path=str(tiny("bert")),
            n_ctx=512,
            n_threads=1,
            max_tokens=16,
            request_timeout_s=2,
            responses_store=1 << 20,
            reload_grace_s=1,
            hf_endpoint=hub.url,
            api_keys=keys("use"),
            admin_api_keys=keys("boss"),
            port=0,
        )
        with serving(build(settings)) as url:
            yield url


def test_every_answer_is_one_that_the_document_describes(address: str, tmp_path: Path) -> None:
    """Whatever the request, valid or not."""
    report = tmp_path / "report.json"
    if EXAMPLES:
        options = ["--phases=examples,coverage,fuzzing,stateful", f"--max-examples={EXAMPLES}"]
    else:
        # An operation without a body has fewer cases than asked for. Each case of /reload loads a model.
        examples = math.ceil(CASES / len(OPERATIONS))
        options = ["--phases=examples,fuzzing", f"--max-examples={examples}", "--seed=1", "--no-shrink"]
        options.append("--exclude-path=/reload")
    command = [
        str(Path(sys.executable).with_name("st")),
        f"--config-file={Path(__file__).with_name('schemathesis.toml')}",
        "run",
        f"{address}/openapi.json",
        "--header=Authorization: Bearer boss",
        "--checks=all",
        "--continue-on-failure",
        "--request-timeout=30",
        "--no-color",
        "--warnings=off",
        "--report=json",
        f"--report-json-path={report}",
        *options,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, check=False)

    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    summary: Any = json.loads(report.read_text())
    assert summary["complete"]
    assert summary["test_cases"]["generated"] >= CASES
    print(f"{summary['test_cases']['generated']} cases in {summary['running_time']:.0f} s")
