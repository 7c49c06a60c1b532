"""What a cold start imports, and what it must not: heavy libraries wait until they are needed."""

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
    """The top-level modules that a fresh interpreter holds once it has imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_handlers_and_core_import_nothing_heavy() -> None:
    """Every handler and operation together cost the standard library and msgspec."""
    handlers = [f"handlers.{path.stem}" for path in (ROOT / "handlers").glob("*.py") if path.stem != "__init__"]
    core = [f"core.{path.stem}" for path in (ROOT / "core").glob("*.py") if path.stem != "__init__"]

    assert set() == imported_by(*handlers, *core) & {*HEAVY, "starlette", "anyio"}


def test_a_function_urls_event_needs_no_framework() -> None:
    """The Lambda runtime reads payload 2.0 and serves the endpoint by itself: neither Mangum nor Starlette."""
    modules = ("adapters.aws_lambda.start", "adapters.aws_lambda.runtime", "adapters.serving.asgi", "adapters.logs")

    assert set() == imported_by(*modules) & {*HEAVY, "starlette", "anyio"}


@pytest.mark.parametrize("module", ["adapters.serving.asgi", "adapters.wiring", "adapters.logs"])
def test_adapters_of_the_cold_path_import_nothing_heavy(module: str) -> None:
    """The application and its wiring load their sources' libraries when a source is used."""
    assert set() == imported_by(module) & set(HEAVY)


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No thread, no file and no logging handler comes from an import."""
    code = (
        "import sys, threading, logging; sys.path.insert(0, sys.argv[1]);"
        "import adapters.serving.asgi, adapters.wiring, adapters.logs, adapters.local.__main__, handlers.dispatch;"
        "assert threading.active_count() == 1, threading.enumerate();"
        "assert not logging.getLogger().handlers"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
