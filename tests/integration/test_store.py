"""The store against a hub: huggingface_hub over HTTP, faults in between, several processes, sudden ends."""

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
    """The one partial file of `name`; its own name holds the version."""
    (part,) = folder.glob(f".{name}.*.part")
    return part


def test_a_download_lands_whole_with_its_sidecar(store: Store, folder: Path) -> None:
    """The file, and what is known of it; nothing else is left behind."""
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


def test_what_is_there_is_not_downloaded_again(store: Store, hub: HubDouble) -> None:
    """A second fetch asks the hub what the branch means and reads no byte of the model."""
    store.fetch(REFERENCE)
    again = store.fetch(REFERENCE)

    assert (again.status, again.sha256, again.source) == ("present", SHA256, "huggingface")
    assert len(hub.gets()) == 1


def test_without_refresh_the_hub_is_not_even_asked(store: Store, hub: HubDouble) -> None:
    """A cold start with the model on its disk needs no network."""
    store.fetch(REFERENCE)
    hub.log.clear()

    assert store.fetch(REFERENCE, refresh=False).status == "present"
    assert store.open(REFERENCE).source == "huggingface"
    assert hub.log == []


def test_a_branch_that_moved_replaces_the_file(store: Store, hub: HubDouble, folder: Path) -> None:
    """The new version takes the name; the sidecar tells the new commit; the pinned old one is no longer here."""
    store.fetch(REFERENCE)
    hub.add(REPO, {NAME: OTHER}, commit="d" * 40)
    fetched = store.fetch(REFERENCE)

    assert (fetched.status, fetched.commit) == ("downloaded", "d" * 40)
    assert fetched.path.read_bytes() == OTHER
    assert names(folder) == [NAME, NAME + ".json"]
    assert store.present(HuggingFace(REPO, NAME, "d" * 40)) == fetched.path
    assert store.present(HuggingFace(REPO, NAME, "c" * 40)) is None


def test_two_repositories_may_have_a_file_of_one_name(store: Store, hub: HubDouble, folder: Path) -> None:
    """The second goes below its repository's name; neither is taken for the other."""
    hub.add("other/repo", {NAME: OTHER})
    first, second = store.fetch(REFERENCE), store.fetch(HuggingFace("other/repo", NAME))

    assert (first.path, second.path) == (folder / NAME, folder / "other/repo" / NAME)
    assert store.present(HuggingFace("other/repo", NAME)) == second.path
    assert store.present(REFERENCE) == first.path
    assert second.path.read_bytes() == OTHER


def test_a_file_put_there_by_hand_is_adopted_if_it_is_the_same(store: Store, hub: HubDouble, folder: Path) -> None:
    """Its sha256 is computed once; then it has a sidecar like any other."""
    files.write(folder, NAME, CONTENT)
    fetched = store.fetch(REFERENCE)

    assert (fetched.status, fetched.sha256) == ("present", SHA256)
    assert hub.gets() == []
    assert sidecar.read(folder / NAME) is not None


def test_a_file_put_there_by_hand_is_not_overwritten_by_another(store: Store, folder: Path) -> None:
    """Someone's own model of the same name stays; the hub's goes beside it."""
    own = files.write(folder, NAME, OTHER)
    fetched = store.fetch(REFERENCE)

    assert own.read_bytes() == OTHER
    assert fetched.path == folder / "org/repo" / NAME


def test_a_truncated_file_is_replaced(store: Store, folder: Path) -> None:
    """The half of a model that another tool left is no model, so its place is free."""
    files.write(folder, NAME, CONTENT[: SIZE // 2])

    assert store.present(REFERENCE) is None
    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_split_model_is_one_model(store: Store, hub: HubDouble, folder: Path) -> None:
    """Any part names it; all parts come; it is listed, found and opened by its first."""
    parts = files.split_model("big", 3)
    hub.add(REPO, parts)
    reference = HuggingFace(REPO, "big-00002-of-00003.gguf")
    seen: list[tuple[int, int]] = []
    fetched = store.fetch(reference, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, parts.values()))

    assert fetched.path == folder / "big-00001-of-00003.gguf"
    assert (fetched.size_bytes, seen[-1]) == (total, (total, total))
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


def test_progress_counts_up_to_the_whole(store: Store) -> None:
    """Bytes done of bytes in all, never backwards."""
    seen: list[tuple[int, int]] = []
    store.fetch(REFERENCE, progress=lambda done, total: seen.append((done, total)))

    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_the_token_stays_with_the_hub(store: Store, hub: HubDouble) -> None:
    """It is sent to the hub and not to where the hub redirects."""
    hub.repos[REPO].token = "t"
    store.fetch(REFERENCE)

    assert {given for host, given in hub.authorizations if host == "hub"} == {"Bearer t"}
    assert {given for host, given in hub.authorizations if host == "cdn"} == {None}


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
def test_what_the_hub_refuses_is_said_in_our_words(
    store: Store, hub: HubDouble, folder: Path, reference: str, kind: type[Exception], words: str
) -> None:
    """Each mistake names the field and what to do; nothing is left on the disk."""
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
    ids=["reset", "short", "empty", "stall", "500", "503 thrice", "429", "HEAD 503 twice"],
)
def test_a_passing_fault_is_survived(store: Store, hub: HubDouble, fault: Fault) -> None:
    """The download goes on where it broke off, and what lands is right."""
    hub.faults.append(fault)
    fetched = store.fetch(REFERENCE)

    assert fetched.path.read_bytes() == CONTENT
    assert len(hub.gets()) >= 2 or fault.on == "HEAD"
    if fault.reset_after is None:  # a reset takes with it what the kernel had received and nobody had read
        assert hub.sent <= len(CONTENT) * 1.1


@pytest.mark.parametrize("on", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [500, 403, 404])
def test_a_lasting_fault_is_a_clear_error_and_the_next_try_succeeds(
    store: Store, hub: HubDouble, folder: Path, on: str, status: int
) -> None:
    """The error is ours; no model appears; when the hub is well again the same call works."""
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
    """The sha256 that the hub names is what counts; the damaged file is thrown away and the next try succeeds."""
    hub.faults.append(Fault(flip=True))
    with pytest.raises(ModelUnavailable, match="arrived damaged"):
        store.fetch(REFERENCE)
    assert names(folder) == []

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_wrong_etag_is_noticed(store: Store, hub: HubDouble, folder: Path) -> None:
    """A hub that names another sha256 than its bytes have delivers nothing."""
    hub.faults.append(Fault(on="HEAD", etag="0" * 64))
    with pytest.raises(ModelUnavailable, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        store.fetch(REFERENCE)

    assert names(folder) == []


def test_a_file_that_is_not_a_gguf_is_refused(store: Store, hub: HubDouble, folder: Path) -> None:
    """Right bytes of the wrong kind: the client is told, nothing stays."""
    hub.add(REPO, {NAME: b"<html>" + bytes(1000)})
    with pytest.raises(InvalidRequest, match="another kind of file"):
        store.fetch(REFERENCE)

    assert names(folder) == []


def test_a_pinned_sha256_is_checked_before_a_byte_is_read(store: Store, hub: HubDouble) -> None:
    """A pin that the hub does not bear out is the client's mistake; the right one is fine."""
    with pytest.raises(InvalidRequest, match=SHA256) as caught:
        store.fetch(REFERENCE, sha256="1" * 64)
    assert caught.value.param == "sha256"
    assert hub.gets() == []

    assert store.fetch(REFERENCE, sha256=SHA256).status == "downloaded"


def test_a_server_that_ignores_ranges_is_survived(store: Store, hub: HubDouble) -> None:
    """When a resumed read is answered with the whole file, the file starts over."""
    hub.faults += [Fault(reset_after=1_500_000), Fault(ignore_range=True)]

    assert store.fetch(REFERENCE).path.read_bytes() == CONTENT


def test_a_cancelled_download_resumes(store: Store, hub: HubDouble, folder: Path) -> None:
    """Cancelling keeps what arrived and nothing else; the next try asks for the rest only."""
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
    (resumed,) = [given for given in hub.gets() if given]
    assert int(resumed.removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert names(folder) == [NAME, NAME + ".json"]


def test_a_partial_of_another_version_is_not_continued(store: Store, hub: HubDouble) -> None:
    """When the branch moved meanwhile, what arrived of the old file is of no use."""
    hub.faults.append(Fault(close_after=1_500_000))
    stop = threading.Event()
    with pytest.raises(DownloadCancelled):
        store.fetch(REFERENCE, progress=lambda done, _: stop.set() if done > 10**6 else None, cancelled=stop.is_set)
    hub.add(REPO, {NAME: OTHER}, commit="d" * 40)

    assert store.fetch(REFERENCE).path.read_bytes() == OTHER


def test_a_damaged_partial_is_found_out(store: Store, hub: HubDouble, folder: Path) -> None:
    """Bytes that changed between two tries make the whole wrong: it is thrown away, the try after that is right."""
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
    """A model that does not fit is refused before a byte of it is read."""
    monkeypatch.setattr(target, "free_disk", lambda _folder: 1000)
    with pytest.raises(ModelUnavailable, match="does not fit in MODELS_DIR"):
        store.fetch(REFERENCE)

    assert hub.gets() == []
    assert names(folder) == []


def test_a_disk_that_fills_up_gives_its_room_back(store: Store, folder: Path) -> None:
    """ENOSPC midway (here: EFBIG) is said in our words, and the partial file goes."""
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
def permissions_count() -> Iterator[None]:
    """Root writes everywhere by a capability (CAP_DAC_OVERRIDE, bit 1): this thread does without it for a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    kept = (ctypes.c_uint32 * 6)()  # twice (effective, permitted, inheritable), low words first
    assert libc.capget(header, kept) == 0
    without = (ctypes.c_uint32 * 6)(*kept)
    without[0] &= ~(1 << 1)
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


def test_a_read_only_folder_says_so(store: Store, folder: Path) -> None:
    """What is in it is served; what is not cannot be brought."""
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with permissions_count(), pytest.raises(ModelUnavailable, match="cannot be written"):
            store.fetch(REFERENCE)
    finally:
        folder.chmod(0o700)


def test_a_folder_that_is_a_link_out_is_refused(store: Store, hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    """A file name with folders cannot lead the download out of MODELS_DIR."""
    hub.add(REPO, {"sub/model.gguf": CONTENT})
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="link to a place outside MODELS_DIR"):
        store.fetch(HuggingFace(REPO, "sub/model.gguf"))

    assert names(tmp_path / "elsewhere") == []


def test_an_unreachable_hub_leaves_what_is_there(tmp_path: Path, store: Store, hub: HubDouble) -> None:
    """With the model on the disk a fetch is content with it; without, it says that the hub cannot be reached."""
    store.fetch(REFERENCE)
    hub.faults.append(Fault(on="HEAD", status=404, times=0))
    away = Store(tmp_path / "models", (_Away(),))

    assert away.fetch(REFERENCE).status == "present"
    with pytest.raises(ModelUnavailable, match="away"):
        away.fetch(HuggingFace(REPO, "another.gguf"))


def test_offline_mode_is_respected(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE stops the download with a word on what to do."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
        store.fetch(REFERENCE)


def test_a_source_that_delivers_rubbish_is_passed_over(store: Store, hub: HubDouble, tmp_path: Path) -> None:
    """A mirror with wrong bytes costs a warning; the hub then delivers, and the mirror is offered the right ones."""
    mirror = _Mirror()
    both = Store(tmp_path / "models", (_Rubbish(), Hub(hub.url, policy=QUICK)), mirror)
    fetched = both.fetch(REFERENCE)

    assert (fetched.source, fetched.path.read_bytes()) == ("huggingface", CONTENT)
    assert mirror.offered == [(REFERENCE, "c" * 40, (fetched.path,))]


class _Away:
    name, authority = "away", True

    def resolve(self, _reference: object, *, refresh: bool, **_: object) -> RemoteModel | None:
        raise ModelUnavailable("The hub is away.")


class _Rubbish:
    """A mirror that claims the right sha256 and writes zeros."""

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
    """The first takes the lock, the others wait for it and find the model there."""
    hub.faults.append(Fault(rate=1_500_000))
    running = [start(folder, hub) for _ in range(10)]
    said = [process.communicate(timeout=120)[0].strip() for process in running]

    assert sorted(said) == ["downloaded"] + ["present"] * 9
    assert len(hub.gets()) == 1
    assert (folder / NAME).read_bytes() == CONTENT
    assert names(folder) == [NAME, NAME + ".json"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_leaves_what_the_next_resumes(hub: HubDouble, folder: Path, how: signal.Signals) -> None:
    """No handler is needed: the kernel releases the lock, the partial file is continued."""
    hub.faults.append(Fault(rate=1_500_000))
    process = start(folder, hub)
    while sum(part.stat().st_size for part in folder.glob(f".{NAME}.*.part")) < 1_200_000:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(how)
    process.communicate(timeout=30)
    assert names(folder) == sorted([f".{NAME}.lock", part_of(folder).name])

    assert Store(folder, (Hub(hub.url),)).fetch(REFERENCE).path.read_bytes() == CONTENT
    assert hub.gets()[1] is not None
    assert names(folder) == [NAME, NAME + ".json"]


def test_a_process_that_was_stopped_goes_on(hub: HubDouble, folder: Path) -> None:
    """SIGSTOP for longer than any timeout (a frozen Lambda): the connection is gone, the download is not."""
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
def test_sudden_ends_never_make_a_wrong_model(folder: Path) -> None:
    """kill -9 at random moments: whatever has the model's name is the whole right model, and the last try succeeds.

    The time until a kill follows the speed of the machine, so that some fetches finish and some do not.
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
    """The content without a network, in pieces: so that many processes take seconds."""

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
    """In a forked child: ends it in any case."""
    try:
        Store(folder, (_Local(0.002),)).fetch(REFERENCE)
    finally:
        os._exit(0)


def memory_store(hub: HubDouble, folder: Path, mirror: _Mirror | None = None) -> Store:
    source = Hub(hub.url, token="t", threads=3, part_bytes=1 << 20, policy=QUICK)
    return Store(folder, (source,), mirror, target="memory")


def test_a_model_goes_to_memory(hub: HubDouble, folder: Path) -> None:
    """In parallel ranges, verified, without a file; the mirror is offered it, and releasing it frees it."""
    mirror = _Mirror()
    model = memory_store(hub, folder, mirror).open(REFERENCE)

    assert (model.name, model.sha256, model.source, model.arrival) == ("model", SHA256, "huggingface", None)
    assert model.path.read_bytes() == CONTENT
    assert len(hub.gets()) >= 2
    assert not folder.exists()
    assert mirror.offered == [(REFERENCE, "c" * 40, (model.path,))]
    assert {given for host, given in hub.authorizations if host == "cdn"} == {None}
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
def test_a_model_goes_to_memory_through_passing_faults(hub: HubDouble, folder: Path, fault: Fault) -> None:
    """A part that breaks off is asked for again; a signed address that was refused is looked up anew."""
    hub.faults.append(fault)
    model = memory_store(hub, folder).open(REFERENCE)

    assert model.path.read_bytes() == CONTENT
    model.release()


def test_wrong_bytes_in_memory_are_never_served(hub: HubDouble, folder: Path) -> None:
    """A memory download that arrives damaged is given up; the disk's then fails or succeeds by its own sha256."""
    hub.faults.append(Fault(on="GET", flip=True, times=100))
    with pytest.raises(ModelUnavailable):
        memory_store(hub, folder).open(REFERENCE)

    assert names(folder) == []


def test_memory_is_checked_first(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit is refused before a byte of it is read, not by the kernel's OOM killer."""
    monkeypatch.setattr(target, "free_memory", lambda: 1_000_000)
    with pytest.raises(ModelUnavailable, match="does not fit in memory"):
        memory_store(hub, folder).open(REFERENCE)

    assert hub.gets() == []


def test_a_split_model_goes_to_the_disk(hub: HubDouble, folder: Path) -> None:
    """llama.cpp finds the parts by their names, which memory does not have."""
    hub.add(REPO, files.split_model("big", 2))
    model = memory_store(hub, folder).open(HuggingFace(REPO, "big-00001-of-00002.gguf"))

    assert (model.name, model.path) == ("big", (folder / "big-00001-of-00002.gguf").resolve())


def test_a_model_on_the_disk_is_opened_there(hub: HubDouble, store: Store, folder: Path) -> None:
    """Memory is for what would have to be downloaded."""
    fetched = store.fetch(REFERENCE)

    assert memory_store(hub, folder).open(REFERENCE).path == fetched.path


def test_a_local_file_is_opened_as_it_is(store: Store, folder: Path) -> None:
    """No source is asked; the name is the file's."""
    files.write(folder, "sub/own.Q8_0.gguf", CONTENT)
    model = store.open(File("sub/own.Q8_0.gguf"))

    assert (model.name, model.source, model.sha256, model.size_bytes) == ("own.Q8_0", "file", None, len(CONTENT))
