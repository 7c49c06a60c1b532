"""Prefetch: which file is read, and that all of it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters.aws_lambda import prefetch
from core.store.embedded import embedded_model

SIZE = (3 << 20) + 5


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"MODEL_PATH": "/a.gguf", "BAKED_MODEL": "/b.gguf"}, "/a.gguf"),
        ({"MODEL_PATH": "", "BAKED_MODEL": "/b.gguf"}, "/b.gguf"),
        ({"MODEL_PATH": "hf://o/r/f.gguf", "BAKED_MODEL": "/b.gguf"}, ""),
        ({"AUTO_REPO_ID": "o/r", "BAKED_MODEL": "/b.gguf"}, ""),
        ({"EMBEDDED_MODEL": "off"}, ""),
        ({}, str(embedded_model() or "")),
    ],
)
def test_the_model_to_be_served_is_prefetched(environ: dict[str, str], path: str) -> None:
    """Remote models are not."""
    assert prefetch.model(environ) == path


def test_all_files_of_a_split_model_are_read() -> None:
    """Their names follow from the first one."""
    assert list(prefetch.parts("/m-00001-of-00003.gguf")) == [f"/m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert list(prefetch.parts("/m.gguf")) == ["/m.gguf"]
    assert list(prefetch.parts("")) == []


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads read pieces that cover the files."""
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for file in files:
        file.write_bytes(os.urandom(SIZE))
    pieces: list[tuple[str, int]] = []
    monkeypatch.setattr(prefetch, "_cached", lambda path, size: False)
    monkeypatch.setattr(prefetch.Reader, "read", lambda self, path, start: pieces.append((path, start)))

    threads = prefetch.begin({"MODEL_PATH": str(files[0])})
    for thread in threads:
        thread.join()

    assert len(threads) == prefetch.THREADS
    assert sorted(pieces) == [(str(file), start << 20) for file in files for start in range(4)]


def test_a_reader_reads_pieces_of_several_files(tmp_path: Path) -> None:
    """It reads up to the end of a file and leaves no file open."""
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(b"x" * SIZE)
    before = len(os.listdir("/proc/self/fd"))
    with prefetch.Reader() as reader:
        for file in files:
            reader.read(str(file), 3 << 20)
        with pytest.raises(FileNotFoundError):
            reader.read(str(tmp_path / "gone"), 0)

    assert len(os.listdir("/proc/self/fd")) == before


def test_needless_reads_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is missing, does not fit into memory or is cached already, as after a restart of the process."""
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * SIZE)
    environ = {"MODEL_PATH": str(file)}

    monkeypatch.setattr(prefetch, "_cached", lambda path, size: False)
    assert prefetch.begin({"MODEL_PATH": str(tmp_path / "gone")}) == []
    assert [thread.join() for thread in prefetch.begin(environ)]
    monkeypatch.setattr(prefetch, "_fits", lambda size: False)
    assert prefetch.begin(environ) == []
    monkeypatch.undo()
    monkeypatch.setattr(prefetch, "_cached", lambda path, size: True)
    assert prefetch.begin(environ) == []


def test_cached_pages_are_detected(tmp_path: Path) -> None:
    """A file that was just written is cached, if the file system can report it."""
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * SIZE)
    fd = os.open(file, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system cannot read without waiting")
    finally:
        os.close(fd)

    assert prefetch._cached(str(file), SIZE)
