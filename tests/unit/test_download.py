"""Downloads: any sequence of breaks ends in the whole right file; locks, room and targets."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest, ModelUnavailable
from core.store import download, lock, sidecar, target
from core.store.reference import HuggingFace
from core.store.source import DownloadCancelled, Partial, Progress, RemoteFile, RemoteModel
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

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        return RemoteModel(
            self.name, reference, (RemoteFile("model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),)
        )

    def download(
        self, _found: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
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
    monkeypatch.setattr(fcntl, "flock", no_flock)
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


class Version:
    """Delivers `content`, half of it before `between` is called. `digest`: whether it names their sha256."""

    name, authority = "s3", False

    def __init__(self, content: bytes, commit: str, between: Callable[[], None], *, digest: bool = True) -> None:
        self.content, self.commit, self.between, self.digest = content, commit, between, digest
        self.asked_from: list[int] = []

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        digest = hashlib.sha256(self.content).hexdigest() if self.digest else None
        return RemoteModel(
            self.name, reference, (RemoteFile("model.gguf", len(self.content), digest, "etag"),), self.commit
        )

    def download(
        self, _found: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        self.asked_from.append(partial.done)
        half = len(self.content) // 2
        if partial.done < half:
            os.pwrite(partial.fd, self.content[:half], 0)
            partial.landed(half)
        self.between()
        os.pwrite(partial.fd, self.content[half:], half)
        partial.landed(len(self.content))
        return True


def no_flock(_descriptor: int, _operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks")


def local_flock(_descriptor: int, _operation: int) -> None:
    """As between two hosts that each lock for themselves."""


@pytest.mark.parametrize("flock", [no_flock, local_flock])
@pytest.mark.parametrize("same", [False, True], ids=["two versions", "one version"])
def test_two_hosts_that_do_not_see_each_others_locks_publish_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[[int, int], None], same: bool
) -> None:
    """One is in the middle while the other downloads and publishes: the file is one version, its sidecar no other's."""
    monkeypatch.setattr(fcntl, "flock", flock)
    other = CONTENT if same else files.padded_model(5000, seed=1)

    def meanwhile() -> None:
        fast = Store(tmp_path, (Version(other, "b" * 40, lambda: None),))  # type: ignore[arg-type]
        fast.fetch(REFERENCE)

    slow = Store(tmp_path, (Version(CONTENT, "a" * 40, meanwhile),))  # type: ignore[arg-type]
    with suppress(ModelUnavailable):  # "Another process replaced what arrived": it is to be tried again
        slow.fetch(REFERENCE)

    path = tmp_path / "model.gguf"
    assert path.read_bytes() in (CONTENT, other)
    described = sidecar.read(path)
    assert described is None or described.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("digest", [True, False], ids=["with a digest", "without"])
def test_what_has_no_digest_is_not_resumed_beyond_a_restart_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: bool
) -> None:
    """After a power cut the note may be ahead of the data, and only a digest would tell."""

    def break_off() -> None:
        raise ModelUnavailable("broke off")

    with pytest.raises(ModelUnavailable, match="broke off"):
        Store(tmp_path, (Version(CONTENT, "a" * 40, break_off, digest=digest),)).fetch(REFERENCE)  # type: ignore[arg-type]
    again = Version(CONTENT, "a" * 40, break_off, digest=digest)
    with pytest.raises(ModelUnavailable, match="broke off"):
        Store(tmp_path, (again,)).fetch(REFERENCE)  # type: ignore[arg-type]
    monkeypatch.setattr(download, "_boot_id", lambda: "another")
    later = Version(CONTENT, "a" * 40, lambda: None, digest=digest)
    Store(tmp_path, (later,)).fetch(REFERENCE)  # type: ignore[arg-type]

    half = len(CONTENT) // 2
    assert (again.asked_from, later.asked_from) == ([half], [half if digest else 0])


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path: Path) -> None:
    """Whoever may write into MODELS_DIR must not have the server write elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / ".model.gguf.lock").symlink_to(victim)
    (folder / f".model.gguf.json.{os.getpid()}-{threading.get_ident()}").symlink_to(victim)
    with pytest.raises(ModelUnavailable):
        Store(folder, (Breaking([]),)).fetch(REFERENCE)  # type: ignore[arg-type]
    (folder / ".model.gguf.lock").unlink()
    Store(folder, (Breaking([]),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert victim.read_text() == "precious"


def test_a_file_put_by_hand_is_not_replaced_in_the_last_place_either(tmp_path: Path) -> None:
    """Where `hf download --local-dir` puts things: the client is asked to move it."""
    own = [
        files.write(tmp_path, name, files.padded_model(4000, seed=seed))
        for seed, name in ((2, "model.gguf"), (3, "org/repo/model.gguf"))
    ]
    before = [path.read_bytes() for path in own]
    with pytest.raises(InvalidRequest, match=r"'org/repo/model.gguf' in MODELS_DIR is another file"):
        Store(tmp_path, (Breaking([]),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert [path.read_bytes() for path in own] == before


def test_a_full_disk_leaves_the_next_holders_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the lock is free nothing is removed any more: the partial file may be another process's."""
    removed: list[str] = []
    real = os.unlink

    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    def unlink(path: str, **options: int) -> None:
        removed.append(Path(path).suffix)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "remove", unlink)
    with pytest.raises(ModelUnavailable):
        Store(tmp_path, (Version(CONTENT, "a" * 40, full),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert removed[-1] == ".lock"
    assert removed.count(".lock") == 1
    assert list(tmp_path.iterdir()) == []
