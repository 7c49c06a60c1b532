"""Crash matrix: kill a process at every call that changes MODELS_DIR, and let another one continue.

Each scenario is run once to record its calls, then once per call with a SIGKILL before the call (a write is also cut in
half). Each next act starts from what is left. The served model must be one complete version that matches its sidecar,
and the next fetch must bring the new version and leave nothing behind. The same calls also fail with ENOSPC, once each.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import ModelUnavailable
from core.store import sidecar
from core.store.reference import HuggingFace
from core.store.source import Partial, Progress, RemoteFile, RemoteModel
from core.store.store import Store
from core.store.versions import current, parts
from tests import gguf_files as files

WHOLE = HuggingFace("org/repo", "model.gguf")
SPLIT = HuggingFace("org/repo", "big-00002-of-00003.gguf")
Contents = Mapping[str, bytes]

# pytest-xdist's workers have a thread that reads from a pipe. The forked child takes none of its locks and ends by
# os._exit or a signal. Python 3.12 and later warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.. may lead to deadlocks:DeprecationWarning")


@functools.cache
def version(number: int, reference: HuggingFace) -> dict[str, bytes]:
    """Return the files of the model at commit `number`. Versions have equal sizes and differ in every file."""
    contents = (
        {"model.gguf": files.padded_model(3000)}
        if reference.filename == "model.gguf"
        else files.split_model("big", 3, 1000)
    )
    return {name: content[:-8] + f"VERSION{number}".encode() for name, content in contents.items()}


class Hub:
    """A source of version `number` in pieces. It fails after `breaks_at` pieces."""

    name, authority = "huggingface", True

    def __init__(self, number: int, *, breaks_at: int = 1000) -> None:
        self.number, self.pieces = number, breaks_at

    def resolve(self, reference: HuggingFace, *, refresh: bool, **_: object) -> RemoteModel:
        contents = version(self.number, reference)
        remote = [RemoteFile(name, len(c), hashlib.sha256(c).hexdigest()) for name, c in sorted(contents.items())]
        return RemoteModel(self.name, reference, tuple(remote), str(self.number) * 40)

    def download(
        self, remote: RemoteModel, file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        assert isinstance(remote.reference, HuggingFace)
        content = version(self.number, remote.reference)[file.path]
        piece = len(content) // 2 + 1
        while partial.done < partial.size:
            if self.pieces == 0:
                raise ModelUnavailable("broke off")
            self.pieces -= 1
            written = os.pwrite(partial.fd, content[partial.done : partial.done + piece], partial.done)
            partial.landed(partial.done + written)
        return False


@dataclass(frozen=True)
class Scenario:
    """`prepare` fills MODELS_DIR; then version 1 is fetched, which takes at least `calls` calls."""

    name: str
    reference: HuggingFace
    prepare: Callable[[Path], None]
    calls: int
    before: bool = False  # a version is served before the fetch


def nothing(_folder: Path) -> None:
    return None


def fetched(reference: HuggingFace, hub: Hub) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        Store(folder, (hub,)).fetch(reference)  # type: ignore[arg-type]

    return prepare


def broken_off(reference: HuggingFace, pieces: int) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        with pytest.raises(ModelUnavailable, match="broke off"):
            fetched(reference, Hub(1, breaks_at=pieces))(folder)

    return prepare


def by_hand(reference: HuggingFace, number: int) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name, content in version(number, reference).items():
            files.write(folder, name, content)

    return prepare


def adopted_split(folder: Path) -> None:
    by_hand(SPLIT, 0)(folder)
    fetched(SPLIT, Hub(0))(folder)


def half_replaced(folder: Path) -> None:
    """Leave an interrupted download of a new version next to the old version."""
    fetched(SPLIT, Hub(0))(folder)
    broken = Store(folder, (Hub(1, breaks_at=3),))  # type: ignore[arg-type]
    assert broken.fetch(SPLIT).commit == "0" * 40  # the present version is served


SCENARIOS = [
    Scenario("publish", WHOLE, nothing, 20),
    Scenario("resume", WHOLE, broken_off(WHOLE, 1), 15),
    Scenario("replace", WHOLE, fetched(WHOLE, Hub(0)), 20, before=True),
    Scenario("adopt", WHOLE, by_hand(WHOLE, 1), 6, before=True),
    Scenario("renew", WHOLE, fetched(replace(WHOLE, revision="v1"), Hub(1)), 6),
    Scenario("place taken", WHOLE, fetched(HuggingFace("other/repo", "model.gguf"), Hub(0)), 22),
    Scenario("split: publish", SPLIT, nothing, 50),
    Scenario("split: resume", SPLIT, broken_off(SPLIT, 3), 35),
    Scenario("split: replace", SPLIT, fetched(SPLIT, Hub(0)), 55, before=True),
    Scenario("split: resume and replace", SPLIT, half_replaced, 40, before=True),
    Scenario("split: replace what lay side by side", SPLIT, adopted_split, 50, before=True),
    Scenario("split: adopt", SPLIT, by_hand(SPLIT, 1), 6, before=True),
    Scenario("split: renew", SPLIT, fetched(replace(SPLIT, revision="v1"), Hub(1)), 6),
]


class Calls:
    """Record this process's calls that change files in `folder`. Install in a forked child only."""

    EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.utime")
    WRITES = ("pwrite", "write")

    def __init__(self, folder: Path, act: Callable[[int], None]) -> None:
        self.folder = str(folder)
        self.act = act  # called before call n, counted from 1; may raise or not return
        self.names: list[str] = []
        self.quiet = False

    def install(self) -> None:
        sys.addaudithook(self._audit)
        for name in self.WRITES:
            setattr(os, name, self._cut(getattr(os, name), name))
        real_sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._count(f"fsync {self._path(descriptor)}")
            real_sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]

    def _count(self, name: str) -> None:
        if self.quiet:
            return
        self.names.append(name.replace(self.folder + "/", ""))
        self.quiet = True  # calls by `act` itself do not count
        try:
            self.act(len(self.names))
        finally:
            self.quiet = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.quiet:
            return
        if event == "open":
            path, _mode, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(self.folder):
                self._count(f"open {path}")
        elif event in self.EVENTS:
            paths = [argument for argument in arguments if isinstance(argument, str | Path)]
            if event == "os.symlink" or any(
                str(p).startswith(self.folder) or not str(p).startswith("/") for p in paths
            ):
                self._count(f"{event} {' '.join(map(str, paths))}")

    def _cut(self, real: Callable[..., int], name: str) -> Callable[..., int]:
        def write(descriptor: int, content: Any, *offset: int) -> int:
            path = self._path(descriptor)
            if not path.startswith(self.folder):
                return real(descriptor, content, *offset)
            self._count(f"{name} {path}")
            half = real(descriptor, memoryview(content)[: len(content) // 2], *offset)
            self._count(f"{name} {path}, second half")
            return half + real(descriptor, memoryview(content)[half:], *(start + half for start in offset))

        return write

    @staticmethod
    def _path(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")


def in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Run `work` in a fork of this process. Return the wait status and its result."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = work()
        except BaseException as error:  # noqa: BLE001 - the parent reports it
            text = f"{type(error).__name__}: {error}"
        os.write(sending, text.encode())
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as reading:
        text = reading.read().decode()
    return os.waitpid(child, 0)[1], text


def fetch_with(folder: Path, scenario: Scenario, act: Callable[[int], None]) -> tuple[int, str]:
    """Fetch in a child with `act` before each call. Return its wait status and the calls, one per line."""

    def work() -> str:
        calls = Calls(folder, act)
        calls.install()
        store = Store(folder, (Hub(1),))  # type: ignore[arg-type]
        try:
            store.fetch(scenario.reference)
        except ModelUnavailable:
            calls.names.append("ModelUnavailable")
        return "\n".join(calls.names)

    return in_child(work)


def kill_at(number: int) -> Callable[[int], None]:
    def act(call: int) -> None:
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail_at(number: int) -> Callable[[int], None]:
    def act(call: int) -> None:
        if call == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def served(path: Path, scenario: Scenario) -> int:
    """Return the version at `path`. Raise AssertionError for a mixture or a sidecar of another version."""
    first = current(path)
    contents = {part.name: part.read_bytes() for part in parts(first)}
    for number in (0, 1):
        if contents == version(number, scenario.reference):
            described = sidecar.read(first)
            digests = tuple(hashlib.sha256(contents[name]).hexdigest() for name in sorted(contents))
            assert described is None or described.digests == digests, "the sidecar speaks of another version"
            return number
    parts_of = [content[-8:].decode("latin-1") for _, content in sorted(contents.items())]
    raise AssertionError(f"a mixture: {parts_of}")


def present(folder: Path, scenario: Scenario) -> None:
    path = Store(folder).present(scenario.reference)
    if path is not None:
        served(path, scenario)
    assert path is not None or not scenario.before, "what was here is gone"


def open_(folder: Path, scenario: Scenario) -> None:
    model = Store(folder, (Hub(1),), target="disk").open(scenario.reference)  # type: ignore[arg-type]
    number = served(model.path, scenario)
    assert model.commit is None or model.commit == str(number) * 40, "the sidecar names another commit"


def fetch(folder: Path, scenario: Scenario) -> None:
    result = Store(folder, (Hub(1),)).fetch(scenario.reference)  # type: ignore[arg-type]
    assert served(result.path, scenario) == 1, "the new version did not come"
    assert sidecar.read(current(result.path)) is not None


def list_(folder: Path, scenario: Scenario) -> None:
    for model in Store(folder).list():
        served(model.path, scenario)


ACTS = {"present": present, "list": list_, "open": open_, "fetch": fetch}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@dataclass(frozen=True)
class Recorded:
    before: Path
    calls: list[str]
    after: list[str]  # the names that an undisturbed fetch leaves


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder in memory if possible: a kill loses no writes, and fsync takes no time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="crash-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def recorded(tmp_path: Path, request: pytest.FixtureRequest) -> Recorded:
    scenario: Scenario = request.getfixturevalue("scenario")
    before = tmp_path / "before"
    before.mkdir()
    scenario.prepare(before)
    shutil.copytree(before, tmp_path / "undisturbed", symlinks=True)
    status, calls = fetch_with(tmp_path / "undisturbed", scenario, lambda _call: None)
    assert (status, "Error" in calls) == (0, False), calls
    fetch(tmp_path / "undisturbed", scenario)
    return Recorded(before, calls.splitlines(), names(tmp_path / "undisturbed"))


def disturbed(
    tmp_path: Path,
    scenario: Scenario,
    recorded: Recorded,
    disturb: Callable[[int], Callable[[int], None]],
    end: int,
    acts: tuple[str, ...] = tuple(ACTS),
) -> list[str]:
    """Return the errors after each disturbance, one per line."""
    assert len(recorded.calls) >= scenario.calls, recorded.calls
    wrong = []
    for number, call in enumerate(recorded.calls, 1):
        left = tmp_path / "left"
        shutil.copytree(recorded.before, left, symlinks=True)
        status, text = fetch_with(left, scenario, disturb(number))
        assert status == end, f"call {number} ({call}): {text}"
        for name in acts:
            folder = left
            if name == "open":  # `open` may download; `fetch` is last, and the others only read
                folder = tmp_path / "copy"
                shutil.copytree(left, folder, symlinks=True)
            try:
                ACTS[name](folder, scenario)
                assert name != "fetch" or names(folder) == recorded.after, f"left behind: {names(folder)}"
            except Exception as error:  # noqa: BLE001 - each is reported
                wrong.append(f"before call {number} ({call}), then {name}: {type(error).__name__}: {error}")
            if folder != left:
                shutil.rmtree(folder)
        shutil.rmtree(left)
    return wrong


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_kill_at_any_call_leaves_one_complete_version(tmp_path: Path, scenario: Scenario, recorded: Recorded) -> None:
    """It is the old or the new version. A served model stays available, and the next fetch cleans up."""
    wrong = disturbed(tmp_path, scenario, recorded, kill_at, signal.SIGKILL)

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_failed_call_leaves_one_complete_version(tmp_path: Path, scenario: Scenario, recorded: Recorded) -> None:
    """The disk is full at any one call."""
    wrong = disturbed(tmp_path, scenario, recorded, fail_at, 0, ("present", "fetch"))

    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "scenario", [each for each in SCENARIOS if each.name.startswith("split: replace")], ids=lambda each: each.name
)
def test_parts_that_are_opened_in_turn_are_of_one_version(tmp_path: Path, scenario: Scenario) -> None:
    """llama.cpp opens parts one by one. During a replacement they are of one version or missing."""
    scenario.prepare(tmp_path)
    readers: list[tuple[list[Path], int]] = []

    def work() -> str:
        wrong = []

        def act(call: int) -> None:
            for others, number in readers:
                contents = version(number, scenario.reference)
                mixed = [path for path in others if path.exists() and path.read_bytes() != contents[path.name]]
                wrong.extend(f"before call {call}: {path} is not of version {number}" for path in mixed)
            first, *others = parts(Store(tmp_path).open(scenario.reference).path)
            number = int(first.read_bytes()[-1:])
            readers.append((others, number))

        calls = Calls(tmp_path, act)
        calls.install()
        Store(tmp_path, (Hub(1),)).fetch(scenario.reference)  # type: ignore[arg-type]
        act(0)
        assert {number for _, number in readers} == {0, 1}
        return "\n".join(wrong)

    assert in_child(work) == (0, "")
