"""DOWNLOAD_THREADS and DOWNLOAD_PART_MB, from the setting to the requests that the hub sees."""

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
    """Receive a model into memory as the settings say, from a hub that is slow enough for threads to overlap."""
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
    """How much each request asked for."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", given or "") for given in hub.gets()]
    return [int(one[2]) - int(one[1]) + 1 for one in ranges if one]


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_reads_at_once_as_download_threads(tmp_path: Path, threads: int) -> None:
    """One thread reads one range after the other."""
    hub = download(tmp_path, {"DOWNLOAD_THREADS": str(threads), "DOWNLOAD_PART_MB": "2"})

    assert hub.most_at_once == threads


@pytest.mark.parametrize(("part_mb", "largest"), [(2, 2 * MIB), (4, 4 * MIB), (0, 8 * MIB)])
def test_a_read_is_as_large_as_download_part_mb(tmp_path: Path, part_mb: int, largest: int) -> None:
    """The first is of that size; later ones may be smaller, so that all threads finish together."""
    hub = download(tmp_path, {"DOWNLOAD_THREADS": "1", "DOWNLOAD_PART_MB": str(part_mb)})

    assert max(sizes(hub)) == sizes(hub)[0] == largest
    assert sum(sizes(hub)) == len(CONTENT)
