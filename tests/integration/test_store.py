"""The store with a hub: huggingface_hub over HTTP, faults, several processes and kills."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_double import Fault, HubDouble

from adapters.huggingface.source import Hub
from adapters.transfer.retry import Backoff, RetryPolicy
from core.errors import InvalidRequest, ModelNotFound, ModelUnavailable
from core.store import sidecar, target
from core.store.reference import File, HuggingFace, parse
from core.store.source import DownloadCancelled, Partial, Progress, RemoteFile, RemoteModel
from core.store.store import Store
from core.store.versions import parts as parts_of
from tests import gguf_files as files
from tests.integration.memory import is_open

REPO = "org/repo"
NAME = "model.gguf"
REFERENCE = HuggingFace(REPO, NAME)
QUICK = RetryPolicy(attempts=5, backoff=Backoff(0.01, 0.1))
SIZE = 3_000_000
CONTENT = files.padded_model(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = files.padded_model(SIZE, seed=1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    with HubDouble() as double:
        double.add(REPO, {NAME: CONTENT})
        yield double
        close_session()


@pytest.fixture
def store(hub: HubDouble, tmp_path: Path) -> Store:
    return Store(tmp_path / "models", (Hub(hub.url, token="t", policy=QUICK),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def part_of(folder: Path, name: str = NAME) -> Path:
    """Return the only partial file of `name`. Its file name contains the version."""
    (part,) = folder.glob(f".{name}.*.part")
    return part


def test_a_download_has_a_sidecar(store: Store, folder: Path) -> None:
    """No other file is left."""
    fetched = store.fetch(REFERENCE)

    assert (fetched.status, fetched.sha256, fetched.source) == ("downloaded", SHA256, "huggingface")
    assert (fetched.commit, fetched.size_bytes) == ("c" * 40, len(CONTENT))
    assert fetched.path.read_bytes() == CONTENT
    assert names(folder) == [NAME, NAME + ".json"]
    assert (
        json.loads((folder / (NAME + ".json")).read_text()).items()
        >= {
            "origin": "hf://org/repo/model.gguf",
            "source": "huggingface",
            "revision": "main",
            "commit": "c" * 40,
            "sha256": SHA256,
            "size_bytes": len(CONTENT),
        }.items()
    )
    assert store.present(REFERENCE) == fetched.path
    assert [model.name for model in store.list()] == [NAME]


def test_a_present_model_is_not_downloaded_again(store: Store, hub: HubDouble) -> None:
    """A second fetch resolves the branch at the hub and reads no bytes of the model."""
    store.fetch(REFERENCE)
    second = store.fetch(REFERENCE)

    assert (second.status, second.sha256, second.source) == ("present", SHA256, "huggingface")
    assert len(hub.gets()) == 1


def test_without_refresh_the_hub_gets_no_request(store: Store, hub: HubDouble) -> None:
    """A cold start with the model on its disk needs no network."""
    store.fetch(REFERENCE)
    hub.log.clear()

    assert store.fetch(REFERENCE, refresh=False).status == "present"
    assert store.open(REFERENCE).source == "huggingface"
    assert hub.log == []


def test_a_branch_that_moved_replaces_the_file(store: Store, hub: HubDouble, folder: Path) -> None:
    """The sidecar has the new commit, and the old one is no longer present."""
    store.fetch(REFERENCE)
    hub.add(REPO, {NAME: OTHER}, commit="d" * 40)
    fetched = store.fetch(REFERENCE)

    assert (fetched.status, fetched.commit) == ("downloaded", "d" * 40)
    assert fetched.path.read_bytes() == OTHER
    assert names(folder) == [NAME, NAME + ".json"]
    assert store.present(HuggingFace(REPO, NAME, "d" * 40)) == fetched.path
    assert store.present(HuggingFace(REPO, NAME, "c" * 40)) is None


def test_two_repositories_may_have_files_of_the_same_name(store: Store, hub: HubDouble, folder: Path) -> None:
    """The second is stored below its repository's name."""
    hub.add("other/repo", {NAME: OTHER})
    first, second = store.fetch(REFERENCE), store.fetch(HuggingFace("other/repo", NAME))

    assert (first.path, second.path) == (folder / NAME, folder / "other/repo" / NAME)
    assert store.present(HuggingFace("other/repo", NAME)) == second.path
    assert store.present(REFERENCE) == first.path
    assert second.path.read_bytes() == OTHER


def test_an_equal_file_copied_by_hand_is_adopted(store: Store, hub: HubDouble, folder: Path) -> None:
    """Its SHA-256 is computed once; then it has a sidecar."""
    files.write(folder, NAME, CONTENT)
    fetched = store.fetch(REFERENCE)

    assert (fetched.status, fetched.sha256) == ("present", SHA256)
    assert hub.gets() == []
    assert sidecar.read(folder / NAME) is not None


def test_another_file_copied_by_hand_is_not_overwritten(store: Store, folder: Path) -> None:
    """The hub's model is stored below its repository's name."""
    own = files.write(folder, NAME, OTHER)
    fetched = store.fetch(REFERENCE)

    assert own.read_bytes() == OTHER
    assert fetched.path == folder / "org/repo" / NAME


def test_a_truncated_file_is_replaced(store: Store, folder: Path) -> None:
    """Another tool may have left half of a model, which need not be preserved."""
    files.write(folder, NAME, CONTENT[: SIZE // 2])

    assert store.present(REFERENCE) is None
    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_split_model_is_one_model(store: Store, hub: HubDouble, folder: Path) -> None:
    """Any part names it and all parts are downloaded. It is listed and opened by its first part."""
    parts = files.split_model("big", 3)
    hub.add(REPO, parts)
    reference = HuggingFace(REPO, "big-00002-of-00003.gguf")
    progress: list[tuple[int, int]] = []
    fetched = store.fetch(reference, progress=lambda done, total: progress.append((done, total)))
    total = sum(map(len, parts.values()))

    assert fetched.path == folder / "big-00001-of-00003.gguf"
    assert (fetched.size_bytes, progress[-1]) == (total, (total, total))
    assert [(model.name, model.size_bytes) for model in store.list()] == [("big-00001-of-00003.gguf", total)]
    model = store.open(reference)
    assert (model.name, store.present(reference)) == ("big", fetched.path)
    assert store.locate("big-00003-of-00003.gguf") == model.path == fetched.path.resolve()
    assert {path.name: path.read_bytes() for path in parts_of(model.path)} == parts
    parts_of(model.path)[1].unlink()
    assert store.list() == ()
    assert store.present(reference) is None
    with pytest.raises(InvalidRequest, match=r"big-00002-of-00003\.gguf' is missing"):
        store.locate("big-00001-of-00003.gguf")


def test_progress_counts_up_to_the_size(store: Store) -> None:
    """It reports (done bytes, total bytes) and never goes backwards."""
    reports: list[tuple[int, int]] = []
    store.fetch(REFERENCE, progress=lambda done, total: reports.append((done, total)))

    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert reports == sorted(reports)


def test_the_token_stays_with_the_hub(store: Store, hub: HubDouble) -> None:
    """It is not sent to the CDN that the hub redirects to."""
    hub.repos[REPO].token = "t"
    store.fetch(REFERENCE)

    assert {header for host, header in hub.authorizations if host == "hub"} == {"Bearer t"}
    assert {header for host, header in hub.authorizations if host == "cdn"} == {None}


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("hf://org/none/model.gguf", ModelNotFound, "no repository org/none"),
        ("hf://org/repo/none.gguf", ModelNotFound, "no file 'none.gguf' in revision 'main'"),
        ("hf://org/repo/model.gguf@v9", ModelNotFound, "no revision 'v9'"),
        ("hf://org/gated/model.gguf", InvalidRequest, "gated: accept its terms"),
        ("hf://org/private/model.gguf", InvalidRequest, "HF_TOKEN"),
    ],
)
def test_refusals_of_the_hub_become_our_errors(
    store: Store, hub: HubDouble, folder: Path, reference: str, kind: type[Exception], words: str
) -> None:
    """The error says what to do, and no file is left on the disk."""
    hub.add("org/gated", {NAME: CONTENT}, gated=True)
    hub.add("org/private", {NAME: CONTENT}, token="another")
    with pytest.raises(kind, match=words):
        store.fetch(parse(reference))  # type: ignore[arg-type]

    assert not folder.exists()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(reset_after=1_500_000),
        Fault(close_after=1_500_000),
        Fault(close_after=0),
        Fault(stall_after=1_500_000),
        Fault(status=500),
        Fault(status=503, times=3),
        Fault(status=429),
        Fault(on="HEAD", status=503, times=2),
    ],
    ids=["reset", "short", "empty", "stall", "500", "503 three times", "429", "HEAD 503 twice"],
)
def test_a_passing_fault_is_retried(store: Store, hub: HubDouble, fault: Fault) -> None:
    """The download resumes where it was interrupted."""
    hub.faults.append(fault)
    fetched = store.fetch(REFERENCE)

    assert fetched.path.read_bytes() == CONTENT
    assert len(hub.gets()) >= 2 or fault.on == "HEAD"
    if fault.reset_after is None:  # a reset discards bytes in the kernel that were not read yet
        assert hub.sent <= len(CONTENT) * 1.1


@pytest.mark.parametrize("on", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [500, 403, 404])
def test_a_lasting_fault_is_a_clear_error(store: Store, hub: HubDouble, folder: Path, on: str, status: int) -> None:
    """No model is left. When the hub works again, the same call succeeds."""
    hub.faults.append(Fault(on=on, status=status, times=100))
    kind = ModelUnavailable if status == 500 else InvalidRequest
    with pytest.raises(kind) as caught:
        store.fetch(REFERENCE)
    assert "huggingface_hub" not in caught.value.message
    assert store.list() == ()
    assert not folder.exists() or names(folder) == []
    hub.faults.clear()

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_wrong_bytes_never_become_a_model(store: Store, hub: HubDouble, folder: Path) -> None:
    """A file that does not match the hub's SHA-256 is deleted, and the next attempt succeeds."""
    hub.faults.append(Fault(flip=True))
    with pytest.raises(ModelUnavailable, match="arrived damaged"):
        store.fetch(REFERENCE)
    assert names(folder) == []

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_wrong_etag_is_an_error(store: Store, hub: HubDouble, folder: Path) -> None:
    """The hub's SHA-256 does not match its bytes."""
    hub.faults.append(Fault(on="HEAD", etag="0" * 64))
    with pytest.raises(ModelUnavailable, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        store.fetch(REFERENCE)

    assert names(folder) == []


def test_a_file_that_is_not_a_gguf_is_refused(store: Store, hub: HubDouble, folder: Path) -> None:
    """It matches its SHA-256, but it is deleted."""
    hub.add(REPO, {NAME: b"<html>" + bytes(1000)})
    with pytest.raises(InvalidRequest, match="another kind of file"):
        store.fetch(REFERENCE)

    assert names(folder) == []


def test_a_pin_is_checked_before_the_download(store: Store, hub: HubDouble) -> None:
    """A pin that differs from the hub's SHA-256 is a 400."""
    with pytest.raises(InvalidRequest, match=SHA256) as caught:
        store.fetch(REFERENCE, sha256="1" * 64)
    assert caught.value.param == "sha256"
    assert hub.gets() == []

    assert store.fetch(REFERENCE, sha256=SHA256).status == "downloaded"


def test_a_server_may_ignore_ranges(store: Store, hub: HubDouble) -> None:
    """If a resumed read returns the whole file, the download starts over."""
    hub.faults += [Fault(reset_after=1_500_000), Fault(ignore_range=True)]

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_cancelled_download_resumes(store: Store, hub: HubDouble, folder: Path) -> None:
    """Only the partial file and the lock stay. The next attempt requests the rest."""
    hub.faults.append(Fault(rate=3_000_000))
    stop = threading.Event()

    def progress(done: int, _total: int) -> None:
        if done > 1_000_000:
            stop.set()

    with pytest.raises(DownloadCancelled):
        store.fetch(REFERENCE, progress=progress, cancelled=stop.is_set)
    assert names(folder) == sorted([f".{NAME}.lock", part_of(folder).name])
    assert store.list() == ()

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT
    (resumed,) = [header for header in hub.gets() if header]
    assert int(resumed.removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert names(folder) == [NAME, NAME + ".json"]


def test_a_partial_file_of_another_version_is_not_resumed(store: Store, hub: HubDouble) -> None:
    """The branch moved between the two attempts."""
    hub.faults.append(Fault(close_after=1_500_000))
    stop = threading.Event()
    with pytest.raises(DownloadCancelled):
        store.fetch(REFERENCE, progress=lambda done, _: stop.set() if done > 10**6 else None, cancelled=stop.is_set)
    hub.add(REPO, {NAME: OTHER}, commit="d" * 40)

    assert store.fetch(REFERENCE).path.read_bytes() == OTHER


def test_a_damaged_partial_file_is_deleted(store: Store, hub: HubDouble, folder: Path) -> None:
    """Bytes changed between two attempts, so the checksum fails. The next attempt starts over."""
    stop = threading.Event()
    hub.faults.append(Fault(rate=3_000_000))
    with pytest.raises(DownloadCancelled):
        store.fetch(REFERENCE, progress=lambda done, _: stop.set() if done > 10**6 else None, cancelled=stop.is_set)
    with part_of(folder).open("r+b") as part:
        part.seek(500_000)
        part.write(b"damage")
    with pytest.raises(ModelUnavailable, match="arrived damaged"):
        store.fetch(REFERENCE)

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_disk_space_is_checked_first(
    store: Store, hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not fit is refused before the download."""
    monkeypatch.setattr(target, "free_disk", lambda _folder: 1000)
    with pytest.raises(ModelUnavailable, match="does not fit in MODELS_DIR"):
        store.fetch(REFERENCE)

    assert hub.gets() == []
    assert names(folder) == []


def test_a_full_disk_is_a_clear_error(store: Store, folder: Path) -> None:
    """The partial file is deleted. The test uses EFBIG for ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(ModelUnavailable, match="does not fit in MODELS_DIR"):
            store.fetch(REFERENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == []

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


@contextmanager
def without_root_capability() -> Iterator[None]:
    """Drop the capability by which root writes everywhere (CAP_DAC_OVERRIDE, bit 1) in this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    original = (ctypes.c_uint32 * 6)()  # twice (effective, permitted, inheritable), low words first
    assert libc.capget(header, original) == 0
    reduced = (ctypes.c_uint32 * 6)(*original)
    reduced[0] &= ~(1 << 1)
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, original) == 0


def test_a_read_only_folder_is_a_clear_error(store: Store, folder: Path) -> None:
    """A fetch cannot write to it."""
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with without_root_capability(), pytest.raises(ModelUnavailable, match="cannot be written"):
            store.fetch(REFERENCE)
    finally:
        folder.chmod(0o700)


def test_a_folder_that_links_outside_is_refused(store: Store, hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    """A file name with folders cannot lead a download out of MODELS_DIR."""
    hub.add(REPO, {"sub/model.gguf": CONTENT})
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="link to a place outside MODELS_DIR"):
        store.fetch(HuggingFace(REPO, "sub/model.gguf"))

    assert names(tmp_path / "elsewhere") == []


def test_without_a_hub_the_present_model_is_used(tmp_path: Path, store: Store, hub: HubDouble) -> None:
    """A model that is not present is ModelUnavailable."""
    store.fetch(REFERENCE)
    hub.faults.append(Fault(on="HEAD", status=404, times=0))
    away = Store(tmp_path / "models", (_Away(),))

    assert away.fetch(REFERENCE).status == "present"
    with pytest.raises(ModelUnavailable, match="away"):
        away.fetch(HuggingFace(REPO, "another.gguf"))


def test_offline_mode_is_respected(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE makes a download an error that names the variable."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
        store.fetch(REFERENCE)


def test_a_source_with_wrong_bytes_is_skipped(store: Store, hub: HubDouble, tmp_path: Path) -> None:
    """The hub is used instead, and the mirror is offered the right bytes."""
    mirror = _Mirror()
    both = Store(tmp_path / "models", (_WrongBytes(), Hub(hub.url, policy=QUICK)), mirror)
    fetched = both.fetch(REFERENCE)

    assert (fetched.source, fetched.path.read_bytes()) == ("huggingface", CONTENT)
    assert mirror.offered == [(REFERENCE, "c" * 40, (fetched.path,))]


class _Away:
    name, authority = "away", True

    def resolve(self, _reference: object, *, refresh: bool, **_: object) -> RemoteModel | None:
        raise ModelUnavailable("The hub is away.")


class _WrongBytes:
    """A mirror that claims the right SHA-256 and writes zeros."""

    name, authority = "rubbish", False

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        return RemoteModel(self.name, reference, (RemoteFile(NAME, len(CONTENT), SHA256),), "c" * 40)

    def download(
        self, _remote: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        os.pwrite(partial.fd, bytes(partial.size), 0)
        partial.landed(partial.size)
        return False


class _Mirror:
    def __init__(self) -> None:
        self.offered: list[object] = []
        self.distrusted: list[RemoteModel] = []

    def offer(self, reference: HuggingFace, remote: RemoteModel, paths: tuple[Path, ...]) -> None:
        self.offered.append((reference, remote.commit, paths))

    def distrust(self, remote: RemoteModel) -> None:
        self.distrusted.append(remote)


FETCH = """
import sys
from pathlib import Path
from adapters.huggingface.source import Hub
from core.store.reference import HuggingFace
from core.store.store import Store
from adapters.transfer.retry import Backoff, RetryPolicy
QUICK = RetryPolicy(attempts=5, backoff=Backoff(0.01, 0.1))
print(Store(Path(sys.argv[1]), (Hub(sys.argv[2], policy=QUICK),)).fetch(HuggingFace("org/repo", "model.gguf")).status)
"""


def start(folder: Path, hub: HubDouble) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(folder), hub.url], stdout=subprocess.PIPE, text=True, env=environ
    )


def test_ten_processes_download_a_model_once(hub: HubDouble, folder: Path) -> None:
    """The first takes the lock; the others wait for it and find the model."""
    hub.faults.append(Fault(rate=1_500_000))
    running = [start(folder, hub) for _ in range(10)]
    statuses = [process.communicate(timeout=120)[0].strip() for process in running]

    assert sorted(statuses) == ["downloaded"] + ["present"] * 9
    assert len(hub.gets()) == 1
    assert (folder / NAME).read_bytes() == CONTENT
    assert names(folder) == [NAME, NAME + ".json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_download_of_a_killed_process_is_resumed(hub: HubDouble, folder: Path, number: signal.Signals) -> None:
    """The kernel releases the lock, and the partial file is resumed. No signal handler is needed."""
    hub.faults.append(Fault(rate=1_500_000))
    process = start(folder, hub)
    while sum(part.stat().st_size for part in folder.glob(f".{NAME}.*.part")) < 1_200_000:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    assert names(folder) == sorted([f".{NAME}.lock", part_of(folder).name])

    assert Store(folder, (Hub(hub.url),)).fetch(REFERENCE).path.read_bytes() == CONTENT
    assert hub.gets()[1] is not None
    assert names(folder) == [NAME, NAME + ".json"]


def test_a_stopped_process_continues_its_download(hub: HubDouble, folder: Path) -> None:
    """It was stopped for longer than any timeout, as by Lambda's freeze, so the connection is lost."""
    hub.faults.append(Fault(stall_after=1_500_000, stall_s=1.5))
    process = start(folder, hub)
    while sum(part.stat().st_size for part in folder.glob(f".{NAME}.*.part")) < 1_200_000:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)

    assert process.communicate(timeout=60)[0].strip() == "downloaded"
    assert (folder / NAME).read_bytes() == CONTENT


# A forked child takes no lock of the threads that pytest-xdist's workers have. Python 3.12 and later warn of them.
@pytest.mark.filterwarnings("ignore:.*fork.. may lead to deadlocks:DeprecationWarning")
def test_random_kills_never_leave_a_wrong_model(folder: Path) -> None:
    """After a kill -9 at a random moment, the model's file is missing or complete. The last attempt succeeds.

    The time until a kill adapts to the speed of the machine, so that some fetches finish and some do not.
    """
    draw = random.Random(0)
    finished, killed, longest = 0, 0, 0.05
    while min(finished, killed) < 15:
        assert finished + killed < 1000
        path = folder / NAME
        if path.exists() and draw.random() < 0.5:
            path.unlink()
        missing = not path.exists()
        child = os.fork()
        if child == 0:
            _fetch_slowly(folder)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            assert path.read_bytes() == CONTENT
            if described := sidecar.read(path):
                assert described.sha256 == SHA256
            if missing:
                finished, longest = finished + 1, longest / 1.2
        else:
            killed, longest = killed + 1, longest * 1.2
    store = Store(folder, (_Local(0.0),))

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT
    assert names(folder) == [NAME, NAME + ".json"]


class _Local:
    """A source of the content in pieces, without a network, so that many processes take only seconds."""

    name, authority = "huggingface", True

    def __init__(self, pause: float) -> None:
        self._pause = pause

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        return RemoteModel(self.name, reference, (RemoteFile(NAME, len(CONTENT), SHA256),), "c" * 40)

    def download(
        self, _remote: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        while partial.done < partial.size:
            piece = CONTENT[partial.done : partial.done + 200_000]
            os.pwrite(partial.fd, piece, partial.done)
            partial.landed(partial.done + len(piece))
            time.sleep(self._pause)
        return False


def _fetch_slowly(folder: Path) -> None:
    """Fetch in a forked child and exit in any case."""
    try:
        Store(folder, (_Local(0.002),)).fetch(REFERENCE)
    finally:
        os._exit(0)


def memory_store(hub: HubDouble, folder: Path, mirror: _Mirror | None = None) -> Store:
    source = Hub(hub.url, token="t", threads=3, part_bytes=1 << 20, policy=QUICK)
    return Store(folder, (source,), mirror, target="memory")


def test_a_model_is_downloaded_into_memory(hub: HubDouble, folder: Path) -> None:
    """It is read in parallel ranges, verified and offered to the mirror. No file is written."""
    mirror = _Mirror()
    model = memory_store(hub, folder, mirror).open(REFERENCE)

    assert (model.name, model.sha256, model.source, model.arrival) == ("model", SHA256, "huggingface", None)
    assert model.path.read_bytes() == CONTENT
    assert len(hub.gets()) >= 2
    assert not folder.exists()
    assert mirror.offered == [(REFERENCE, "c" * 40, (model.path,))]
    assert {header for host, header in hub.authorizations if host == "cdn"} == {None}
    memory = model.path.stat()
    model.release()
    model.release()
    assert not is_open(model.path, memory)


def test_a_model_in_memory_is_not_downloaded_again(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened again, as POST /reload does, it shares the bytes, without room for two. The last release frees them."""
    store = memory_store(hub, folder)
    model = store.open(REFERENCE)
    memory = model.path.stat()
    monkeypatch.setattr(target, "free_memory", lambda: 1_000_000)
    downloads = len(hub.gets())
    again = store.open(REFERENCE)

    assert len(hub.gets()) == downloads
    assert (again.path, again.sha256, again.commit) == (model.path, SHA256, "c" * 40)
    model.release()
    model.release()
    assert again.path.read_bytes() == CONTENT
    again.release()
    assert not is_open(again.path, memory)
    with pytest.raises(ModelUnavailable, match="does not fit in memory"):
        store.open(REFERENCE)


def test_a_branch_that_moved_replaces_the_model_in_memory(hub: HubDouble, folder: Path) -> None:
    """Other bytes are downloaded beside the old ones; the same bytes in a new commit are not."""
    store = memory_store(hub, folder)
    model = store.open(REFERENCE)
    hub.add(REPO, {NAME: CONTENT}, commit="d" * 40)
    downloads = len(hub.gets())
    moved = store.open(REFERENCE)
    assert (moved.path, moved.commit, len(hub.gets())) == (model.path, "d" * 40, downloads)

    hub.add(REPO, {NAME: OTHER}, commit="e" * 40)
    new = store.open(REFERENCE)
    assert (new.path.read_bytes(), new.commit) == (OTHER, "e" * 40)
    assert model.path.read_bytes() == CONTENT
    for each in (model, moved, new):
        each.release()


def test_an_unreachable_hub_leaves_what_is_in_memory(hub: HubDouble, folder: Path) -> None:
    """As with a model on the disk: it is served as it is."""
    store = memory_store(hub, folder)
    model = store.open(REFERENCE)
    hub.faults.append(Fault(on="HEAD", status=503, times=100))
    again = store.open(REFERENCE)

    assert again.path == model.path
    model.release()
    again.release()
    with pytest.raises(ModelUnavailable):
        store.open(REFERENCE)


@pytest.mark.parametrize(
    "fault", [Fault(reset_after=500_000), Fault(status=503), Fault(status=403), Fault(close_after=10)], ids=str
)
def test_passing_faults_of_a_memory_download_are_retried(hub: HubDouble, folder: Path, fault: Fault) -> None:
    """An interrupted part is requested again; a refused signed URL is resolved again."""
    hub.faults.append(fault)
    model = memory_store(hub, folder).open(REFERENCE)

    assert model.path.read_bytes() == CONTENT
    model.release()


def test_wrong_bytes_in_memory_are_an_error(hub: HubDouble, folder: Path) -> None:
    """No file is left on the disk either."""
    hub.faults.append(Fault(on="GET", flip=True, times=100))
    with pytest.raises(ModelUnavailable):
        memory_store(hub, folder).open(REFERENCE)

    assert names(folder) == []


def test_memory_is_checked_first(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit is refused before the download, and not by the OOM killer."""
    monkeypatch.setattr(target, "free_memory", lambda: 1_000_000)
    with pytest.raises(ModelUnavailable, match="does not fit in memory"):
        memory_store(hub, folder).open(REFERENCE)

    assert hub.gets() == []


def test_a_split_model_is_downloaded_to_disk(hub: HubDouble, folder: Path) -> None:
    """llama.cpp finds the parts by file name, which a memfd does not have."""
    hub.add(REPO, files.split_model("big", 2))
    model = memory_store(hub, folder).open(HuggingFace(REPO, "big-00001-of-00002.gguf"))

    assert (model.name, model.path) == ("big", (folder / "big-00001-of-00002.gguf").resolve())


def test_a_model_on_the_disk_is_opened_from_disk(hub: HubDouble, store: Store, folder: Path) -> None:
    """Memory is only for models that must be downloaded."""
    fetched = store.fetch(REFERENCE)

    assert memory_store(hub, folder).open(REFERENCE).path == fetched.path


def test_a_local_file_is_opened_directly(store: Store, folder: Path) -> None:
    """No source is used, and the model's name is that of the file."""
    files.write(folder, "sub/own.Q8_0.gguf", CONTENT)
    model = store.open(File("sub/own.Q8_0.gguf"))

    assert (model.name, model.source, model.sha256, model.size_bytes) == ("own.Q8_0", "file", None, len(CONTENT))
