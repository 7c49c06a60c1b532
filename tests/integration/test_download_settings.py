"""DOWNLOAD_THREADS and DOWNLOAD_PART_MB determine the requests that the hub receives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hub_double import Fault, HubDouble

from adapters.wiring import build
from core.settings import Settings
from core.store.reference import HuggingFace
from tests import gguf_files as files

CONTENT = files.padded_model(24 << 20)
MIB = 1 << 20


def download(folder: Path, environ: dict[str, str]) -> HubDouble:
    """Download a model into memory from a hub that is slow enough for threads to overlap."""
    with HubDouble() as hub:
        hub.add("org/repo", {"model.gguf": CONTENT})
        hub.faults.append(Fault(rate=60 * MIB, times=1000))
        environ = {
            "MODELS_DIR": str(folder),
            "MODEL_TARGET": "memory",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "t",
            **environ,
        }
        service = build(Settings.from_env(environ))
        model = service.store.open(HuggingFace("org/repo", "model.gguf"))
        try:
            assert model.path.read_bytes() == CONTENT
        finally:
            model.release()
    return hub


def sizes(hub: HubDouble) -> list[int]:
    """Return the number of bytes that each request asked for."""
    matches = [re.fullmatch(r"bytes=(\d+)-(\d+)", header or "") for header in hub.gets()]
    return [int(match[2]) - int(match[1]) + 1 for match in matches if match]


@pytest.mark.parametrize("threads", [1, 3])
def test_download_threads_is_the_number_of_concurrent_reads(tmp_path: Path, threads: int) -> None:
    """With one thread, ranges are read one after the other."""
    hub = download(tmp_path, {"DOWNLOAD_THREADS": str(threads), "DOWNLOAD_PART_MB": "2"})

    assert hub.most_at_once == threads


@pytest.mark.parametrize(("part_mb", "largest"), [(2, 2 * MIB), (4, 4 * MIB), (0, 8 * MIB)])
def test_download_part_mb_is_the_size_of_a_read(tmp_path: Path, part_mb: int, largest: int) -> None:
    """The first read has that size. Later ones may be smaller, so all threads finish together."""
    hub = download(tmp_path, {"DOWNLOAD_THREADS": "1", "DOWNLOAD_PART_MB": str(part_mb)})

    assert max(sizes(hub)) == sizes(hub)[0] == largest
    assert sum(sizes(hub)) == len(CONTENT)
