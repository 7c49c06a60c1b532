"""Contender: how one server is started and how it is asked; the rest of the benchmark treats all alike."""

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
    """What every server is given, where it can be set."""

    model: Path
    n_ctx: int
    n_batch: int
    n_threads: int
    n_parallel: int


class Contender(Protocol):
    """A server that can be measured. It is started in ROOT."""

    @property
    def name(self) -> str: ...

    def command(self, port: int) -> list[str]: ...

    def environment(self, port: int) -> Mapping[str, str]: ...

    def response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """`response_format` as this server wants it for JSON of `schema`."""
        ...


def json_schema_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's shape. `strict` false: the schemas here use bounds that OpenAI's strict subset leaves out."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": False}}


@dataclass(frozen=True, slots=True)
class Ours:
    """This project's server, as `make run` starts it, with the model loaded at the start."""

    load: Load
    name: str = OURS

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "adapters.local"]

    def environment(self, port: int) -> dict[str, str]:
        # Every setting is named, empty where not ours to set: a developer's .env must not change what is measured.
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
