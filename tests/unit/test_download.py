"""Downloads: any sequence of breaks ends in the whole right file; locks, room and targets."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ModelUnavailable
from core.store import lock, target
from core.store.reference import HuggingFace
from core.store.source import DownloadCancelled, Found, Partial, Progress, RemoteFile
from core.store.store import Store
from tests import gguf_files as files

CONTENT = files.padded_model(5000)
REFERENCE = HuggingFace("org/repo", "model.gguf")


class Breaking:
    """A source that writes pieces in any order, tells how far it came, and breaks off."""

    name, authority = "huggingface", True

    def __init__(self, breaks: list[tuple[int, bool]]) -> None:
        self.breaks = breaks  # how many bytes each try brings, and whether it writes beyond what it tells
        self.asked_from: list[int] = []

    def resolve(self, reference: HuggingFace, *, refresh: bool) -> Found:
        return Found(
            self.name, reference, (RemoteFile("model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),)
        )

    def download(
        self, _found: Found, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        self.asked_from.append(partial.done)
        count, beyond = self.breaks.pop(0) if self.breaks else (len(CONTENT), False)
        end = min(partial.done + count, partial.size)
        if beyond:  # as parallel ranges do: a later part is there before an earlier one
            os.pwrite(partial.fd, CONTENT[-100:], partial.size - 100)
        os.pwrite(partial.fd, CONTENT[partial.done : end], partial.done)
        partial.landed(end)
        if end < partial.size:
            raise ModelUnavailable("broke off")
        return False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6000), st.booleans()), max_size=6))
def test_any_breaks_end_in_the_whole_file(breaks: list[tuple[int, bool]]) -> None:
    """Each try goes on where the last one said it was, and no byte is lost or taken for arrived that is not."""
    source = Breaking(list(breaks))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), (source,))  # type: ignore[arg-type]
        for _ in range(len(breaks) + 1):
            try:
                path = store.fetch(REFERENCE).path
            except ModelUnavailable:
                continue
            break
        assert path.read_bytes() == CONTENT
        assert source.asked_from == sorted(source.asked_from)
        assert sorted(os.listdir(folder)) == ["model.gguf", "model.gguf.json"]


def test_a_try_that_brings_nothing_leaves_nothing(tmp_path: Path) -> None:
    """No empty partial, no lock file."""
    with pytest.raises(ModelUnavailable):
        Store(tmp_path, (Breaking([(0, False)]),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_held_by_one(tmp_path: Path) -> None:
    """Threads exclude each other as processes do; one that waited for a lock that was removed locks the new one."""
    inside, most, notes = 0, 0, []
    waiting = set()

    def work() -> None:
        nonlocal inside, most
        with lock.hold(tmp_path / "x", lambda: False, lambda _note: waiting.add(threading.get_ident())) as held:
            inside += 1
            most = max(most, inside)
            notes.append(held.note)
            held.note = str(len(notes))
            time.sleep(0.01)
            inside -= 1
            if len(notes) % 3 == 0:
                held.remove()  # the last thing a holder does: others may then lock anew

    threads = [threading.Thread(target=work) for _ in range(9)]
    with lock.hold(tmp_path / "x", lambda: False, lambda _note: None):
        for thread in threads:
            thread.start()
        while len(waiting) < 9:
            time.sleep(0.01)
    for thread in threads:
        thread.join()

    assert most == 1
    assert notes == ["", "1", "2", "", "4", "5", "", "7", "8"]


def test_waiting_for_the_lock_can_be_cancelled(tmp_path: Path) -> None:
    """And what the holder does is told meanwhile."""
    seen: list[str] = []
    with lock.hold(tmp_path / "x", lambda: False, seen.append) as held:
        held.note = "v 5"
        with (
            pytest.raises(DownloadCancelled),
            lock.hold(tmp_path / "x", lambda: len(seen) > 1, seen.append),
        ):
            pass

    assert seen == ["v 5", "v 5"]


def test_the_lock_is_not_needed_where_flock_is_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none; a download then goes on without."""
    import errno
    import fcntl

    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = Store(tmp_path, (Breaking([]),))  # type: ignore[arg-type]

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("asked", "disk", "memory", "prefer", "expected"),
    [
        ("disk", 0, 1 << 40, True, "disk"),
        ("memory", 1 << 40, 0, False, "memory"),
        ("auto", 1 << 40, 1 << 40, False, "disk"),
        ("auto", 1 << 40, 1 << 40, True, "memory"),
        ("auto", 0, 1 << 40, False, "memory"),
        ("auto", 0, 100, False, "disk"),
        ("auto", 1 << 40, 100, True, "disk"),
    ],
)
def test_the_target_is_chosen_by_room(
    monkeypatch: pytest.MonkeyPatch, asked: str, disk: int, memory: int, prefer: bool, expected: str
) -> None:
    """What is asked for; else memory if it is preferred or the disk is too small, and there is enough of it."""
    monkeypatch.setattr(target, "free_disk", lambda _folder: disk)
    monkeypatch.setattr(target, "free_memory", lambda: memory)

    assert target.choose(asked, Path("x"), 1 << 20, prefer_memory=prefer) == expected  # type: ignore[arg-type]


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    """A MODELS_DIR that does not exist yet lies on the disk of its nearest parent."""
    assert target.free_disk(tmp_path / "a" / "b") > 0
    assert target.free_memory() > 0
