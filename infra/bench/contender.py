"""How a benchmark starts a server and formats its requests."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.settings import Settings

OURS = "slm-api-server"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Load:
    """The model and the engine settings that all servers get where they can be set."""

    model: Path
    n_ctx: int
    n_batch: int
    n_threads: int
    n_parallel: int


class Contender(Protocol):
    """A server that can be measured. Its command runs in ROOT."""

    @property
    def name(self) -> str: ...

    def command(self, port: int) -> list[str]: ...

    def environment(self, port: int) -> Mapping[str, str]: ...

    def response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return this server's `response_format` for JSON that matches `schema`."""
        ...


def json_schema_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's format. `strict` is false, because OpenAI's strict subset lacks the bounds that are used here."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": False}}


@dataclass(frozen=True, slots=True)
class Ours:
    """This project's server as `make run` starts it, with the model loaded at start."""

    load: Load
    name: str = OURS

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "adapters.local"]

    def environment(self, port: int) -> dict[str, str]:
        # Name every setting, most of them empty, so that a developer's .env does not change the result.
        values = {field.metadata["name"]: "" for field in dataclasses.fields(Settings)}
        return values | {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "MODEL_PATH": str(self.load.model),
            "AUTO_PRELOAD": "true",
            "N_CTX": str(self.load.n_ctx),
            "N_BATCH": str(self.load.n_batch),
            "N_THREADS": str(self.load.n_threads),
            "N_PARALLEL": str(self.load.n_parallel),
        }

    def response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        return json_schema_format(schema)
