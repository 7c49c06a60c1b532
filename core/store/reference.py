"""References: how a model is named. A local file, `hf://org/repo/file.gguf@revision` or `s3://bucket/key`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class File:
    """A path as given; relative ones are looked up in MODELS_DIR, then in the working directory."""

    path: str


@dataclass(frozen=True, slots=True)
class HuggingFace:
    repo_id: str  # "org/repo"
    filename: str  # may hold folders
    revision: str = "main"  # branch, tag or commit


@dataclass(frozen=True, slots=True)
class S3:
    bucket: str
    key: str


Reference = File | HuggingFace | S3


def parse(reference: str) -> Reference:
    """Raises InvalidRequest if it is none of the three forms."""
    raise NotImplementedError
