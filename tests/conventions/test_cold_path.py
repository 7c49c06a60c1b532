"""A cold start imports no heavy libraries; they are imported when they are needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "numpy",
    "jinja2",
    "boto3",
    "botocore",
    "huggingface_hub",
    "llama_cpp",
    "llguidance",
    "jsonschema_rs",
    "mangum",
    "dotenv",
    "uvicorn",
    "hypothesis",
)


def imported_by(*modules: str) -> set[str]:
    """Return the top-level modules that a new interpreter loads when it imports `modules`."""
    code = f"import sys, {', '.join(modules)}; print(' '.join(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return {name.partition(".")[0] for name in process.stdout.split()}


def test_handlers_and_core_import_nothing_heavy() -> None:
    """All handlers and operations import only the standard library and msgspec."""
    handlers = [f"handlers.{path.stem}" for path in (ROOT / "handlers").glob("*.py") if path.stem != "__init__"]
    core = [f"core.{path.stem}" for path in (ROOT / "core").glob("*.py") if path.stem != "__init__"]

    assert set() == imported_by(*handlers, *core) & {*HEAVY, "starlette", "anyio"}


def test_the_lambda_runtime_imports_no_framework() -> None:
    """It reads payload 2.0 and calls the endpoint without Mangum or Starlette."""
    modules = ("adapters.aws_lambda.start", "adapters.aws_lambda.runtime", "adapters.serving.asgi", "adapters.logs")

    assert set() == imported_by(*modules) & {*HEAVY, "starlette", "anyio"}


@pytest.mark.parametrize("module", ["adapters.serving.asgi", "adapters.wiring", "adapters.logs"])
def test_the_application_imports_nothing_heavy(module: str) -> None:
    """The libraries of a source are imported when it is used."""
    assert set() == imported_by(module) & set(HEAVY)


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """Imports start no thread, write no file and add no logging handler."""
    code = (
        "import sys, threading, logging; sys.path.insert(0, sys.argv[1]);"
        "import adapters.serving.asgi, adapters.wiring, adapters.logs, adapters.local.__main__, handlers.dispatch;"
        "assert threading.active_count() == 1, threading.enumerate();"
        "assert not logging.getLogger().handlers"
    )
    process = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert process.returncode == 0, process.stderr
    assert list(tmp_path.iterdir()) == []
