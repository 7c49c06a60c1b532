"""Download one model: interruptions, locks, free space and targets."""

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
    """A source that writes parts in any order, records its progress and fails on schedule."""

    name, authority = "huggingface", True

    def __init__(self, breaks: list[tuple[int, bool]]) -> None:
        self.breaks = (
            breaks  # per attempt: how many bytes arrive, and whether bytes beyond the recorded ones are written
        )
        self.resumed_at: list[int] = []

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        return RemoteModel(
            self.name, reference, (RemoteFile("model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),)
        )

    def download(
        self, _model: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        self.resumed_at.append(partial.done)
        count, beyond = self.breaks.pop(0) if self.breaks else (len(CONTENT), False)
        end = min(partial.done + count, partial.size)
        if beyond:  # as with parallel ranges: a later part arrives before an earlier one
            os.pwrite(partial.fd, CONTENT[-100:], partial.size - 100)
        os.pwrite(partial.fd, CONTENT[partial.done : end], partial.done)
        partial.landed(end)
        if end < partial.size:
            raise ModelUnavailable("broke off")
        return False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6000), st.booleans()), max_size=6))
def test_any_sequence_of_interruptions_ends_in_the_right_file(breaks: list[tuple[int, bool]]) -> None:
    """Each attempt resumes at the recorded position, and no byte is lost or missing."""
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
        assert source.resumed_at == sorted(source.resumed_at)
        assert sorted(os.listdir(folder)) == ["model.gguf", "model.gguf.json"]


def test_an_attempt_without_bytes_leaves_no_files(tmp_path: Path) -> None:
    """Neither an empty partial file nor a lock file remains."""
    with pytest.raises(ModelUnavailable):
        Store(tmp_path, (Breaking([(0, False)]),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert list(tmp_path.iterdir()) == []


def test_the_lock_has_one_holder(tmp_path: Path) -> None:
    """Threads exclude each other as processes do. A waiter whose lock file was removed locks the new one."""
    inside, most, notes = 0, 0, []
    waiting = set()

    def work() -> None:
        nonlocal inside, most
        with lock.hold(tmp_path / "x", lambda: False, lambda _note: waiting.add(threading.get_ident())) as lock_file:
            inside += 1
            most = max(most, inside)
            notes.append(lock_file.note)
            lock_file.note = str(len(notes))
            time.sleep(0.01)
            inside -= 1
            if len(notes) % 3 == 0:
                lock_file.remove()  # a holder's last action: others then create a new lock file

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
    """While waiting, the holder's note is reported."""
    notes: list[str] = []
    with lock.hold(tmp_path / "x", lambda: False, notes.append) as lock_file:
        lock_file.note = "v 5"
        with (
            pytest.raises(DownloadCancelled),
            lock.hold(tmp_path / "x", lambda: len(notes) > 1, notes.append),
        ):
            pass

    assert notes == ["v 5", "v 5"]


def test_a_download_works_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems do not support it."""
    monkeypatch.setattr(fcntl, "flock", no_flock)
    store = Store(tmp_path, (Breaking([]),))  # type: ignore[arg-type]

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("setting", "disk", "memory", "prefer", "expected"),
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
def test_the_target_is_chosen_by_free_space(
    monkeypatch: pytest.MonkeyPatch, setting: str, disk: int, memory: int, prefer: bool, expected: str
) -> None:
    """`auto` means memory if it is large enough and either preferred or the disk is too small; else the disk."""
    monkeypatch.setattr(target, "free_disk", lambda _folder: disk)
    monkeypatch.setattr(target, "free_memory", lambda: memory)

    assert target.choose(setting, Path("x"), 1 << 20, prefer_memory=prefer) == expected  # type: ignore[arg-type]


def test_free_space_of_a_missing_folder_is_that_of_its_parent(tmp_path: Path) -> None:
    """A MODELS_DIR that does not exist yet is on the disk of its nearest parent."""
    assert target.free_disk(tmp_path / "a" / "b") > 0
    assert target.free_memory() > 0


class Version:
    """A source of `content` that calls `between` after half of it. `digest` says whether it reports the SHA-256."""

    name, authority = "s3", False

    def __init__(self, content: bytes, commit: str, between: Callable[[], None], *, digest: bool = True) -> None:
        self.content, self.commit, self.between, self.digest = content, commit, between, digest
        self.resumed_at: list[int] = []

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        digest = hashlib.sha256(self.content).hexdigest() if self.digest else None
        return RemoteModel(
            self.name, reference, (RemoteFile("model.gguf", len(self.content), digest, "etag"),), self.commit
        )

    def download(
        self, _model: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        self.resumed_at.append(partial.done)
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
    """Succeed always, as on two hosts whose locks are local."""


@pytest.mark.parametrize("flock", [no_flock, local_flock])
@pytest.mark.parametrize("same", [False, True], ids=["two versions", "one version"])
def test_two_hosts_without_shared_locks_publish_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[[int, int], None], same: bool
) -> None:
    """One host publishes while the other is half-way. The file is one version and the sidecar matches it."""
    monkeypatch.setattr(fcntl, "flock", flock)
    other = CONTENT if same else files.padded_model(5000, seed=1)

    def meanwhile() -> None:
        fast = Store(tmp_path, (Version(other, "b" * 40, lambda: None),))  # type: ignore[arg-type]
        fast.fetch(REFERENCE)

    slow = Store(tmp_path, (Version(CONTENT, "a" * 40, meanwhile),))  # type: ignore[arg-type]
    with suppress(ModelUnavailable):  # "Another process replaced what arrived": the caller retries
        slow.fetch(REFERENCE)

    path = tmp_path / "model.gguf"
    assert path.read_bytes() in (CONTENT, other)
    published = sidecar.read(path)
    assert published is None or published.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("digest", [True, False], ids=["with a digest", "without"])
def test_without_a_digest_nothing_is_resumed_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: bool
) -> None:
    """After a power cut the recorded position may be ahead of the data, and only a digest would detect it."""

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
    assert (again.resumed_at, later.resumed_at) == ([half], [half if digest else 0])


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    """A user with access to MODELS_DIR must not make the server write elsewhere."""
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


def test_a_file_copied_by_hand_is_never_replaced(tmp_path: Path) -> None:
    """Both possible places are taken, so the error names the file to move."""
    own = [
        files.write(tmp_path, name, files.padded_model(4000, seed=seed))
        for seed, name in ((2, "model.gguf"), (3, "org/repo/model.gguf"))
    ]
    before = [path.read_bytes() for path in own]
    with pytest.raises(InvalidRequest, match=r"'org/repo/model.gguf' in MODELS_DIR is another file"):
        Store(tmp_path, (Breaking([]),)).fetch(REFERENCE)  # type: ignore[arg-type]

    assert [path.read_bytes() for path in own] == before


def test_nothing_is_removed_after_the_lock_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the lock file is removed last, because the partial file may then belong to another process."""
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
