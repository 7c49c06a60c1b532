"""Local models: what is listed, what a client may name, and what its name finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.errors import InvalidRequest, ModelNotFound
from core.store import gguf, sidecar
from core.store.reference import File, HuggingFace
from core.store.sidecar import Sidecar
from core.store.store import Store
from tests import gguf_files as files

MODEL = files.padded_model(2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def describe(path: Path, **changes: object) -> Sidecar:
    stat = path.stat()
    known = {
        "origin": "hf://org/repo/model.gguf",
        "source": "huggingface",
        "sha256": "a" * 64,
        "size_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "published": "2026-11-22T00:00:00+00:00",
        "revision": "main",
        "commit": "c" * 40,
    }
    return Sidecar(**{**known, **changes})  # type: ignore[arg-type]


def test_models_are_listed_by_name_wherever_they_lie(folder: Path) -> None:
    """Subfolders are searched; hidden files, other files, and models that are not whole are left out."""
    for name in ("b.gguf", "sub/a.GGUF", ".part.gguf", ".cache/x.gguf", "notes.txt"):
        files.write(folder, name, MODEL)
    for name, content in files.split_model("big", 3).items():
        files.write(folder, name, content)
    files.write(folder, "half-00001-of-00002.gguf", MODEL)

    models = Store(folder).list()

    assert [model.name for model in models] == ["b.gguf", "big-00001-of-00003.gguf", "sub/a.GGUF"]
    assert models[1].size_bytes == sum(map(len, files.split_model("big", 3).values()))


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    """A fresh installation has no MODELS_DIR yet."""
    store = Store(tmp_path / "none")

    assert store.list() == ()
    with pytest.raises(ModelNotFound, match="MODELS_DIR is empty"):
        store.locate("a.gguf")


def test_a_model_is_found_by_its_name_or_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to MODELS_DIR, absolute inside it, or relative to the working directory."""
    path = files.write(folder, "sub/a.gguf", MODEL)
    monkeypatch.chdir(folder.parent)
    store = Store(Path("models"))

    assert store.locate("sub/a.gguf") == path
    assert store.locate(str(path)) == path
    assert store.locate("models/sub/a.gguf") == path
    assert store.locate("sub/../sub/a.gguf") == path


@pytest.mark.parametrize(
    "name",
    [
        "../outside.gguf",
        "sub/../../outside.gguf",
        "/etc/passwd",
        "/etc/passwd.gguf",
        "link.gguf",
        "linked/outside.gguf",
        "a\0.gguf",
        "a\n.gguf",
        "\udcff.gguf",
        "",
        "x" * 5000 + ".gguf",
        "~/outside.gguf/../../x.gguf/../../../y.gguf",
    ],
)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    """Parent folders, absolute paths, links and bytes that no path has are the client's mistake."""
    outside = files.write(folder.parent, "outside.gguf", MODEL)
    (folder / "link.gguf").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    store = Store(folder)

    with pytest.raises(InvalidRequest) as caught:
        store.locate(name)
    assert caught.value.status == 400
    assert store.list() == ()


def test_a_name_that_no_file_system_takes_is_just_not_there(folder: Path) -> None:
    """A component of 300 bytes raises in the kernel; a client hears 404."""
    with pytest.raises(ModelNotFound):
        Store(folder).locate("x" * 300 + ".gguf")


def test_a_loop_of_links_is_just_not_there(folder: Path) -> None:
    """A folder that was mounted or copied wrongly breaks neither the list nor the look-up."""
    (folder / "a.gguf").symlink_to(folder / "b.gguf")
    (folder / "b.gguf").symlink_to(folder / "a.gguf")

    assert Store(folder).list() == ()
    with pytest.raises(ModelNotFound):
        Store(folder).locate("a.gguf")


def test_a_missing_model_is_answered_with_those_that_exist(folder: Path) -> None:
    """404, and what to say instead."""
    files.write(folder, "b.gguf", MODEL)
    with pytest.raises(ModelNotFound, match=r"no model 'c\.gguf'.*There are: b\.gguf"):
        Store(folder).locate("c.gguf")


def test_allowed_files_are_served_from_anywhere(folder: Path) -> None:
    """The configured, embedded or baked model may lie elsewhere, also behind a link as in a hub cache."""
    blob = files.write(folder.parent, "blobs/0123", MODEL)
    link = folder.parent / "snapshot" / "nice.gguf"
    link.parent.mkdir()
    link.symlink_to(blob)
    store = Store(folder, allowed=(link,))

    assert store.locate(str(link)) == link
    assert store.open(File(str(link))).name == "nice"
    with pytest.raises(InvalidRequest, match="outside"):
        Store(folder).locate(str(link))


def test_a_damaged_model_is_refused_with_the_reason(folder: Path) -> None:
    """Truncated, foreign, or no .gguf at all."""
    files.write(folder, "cut.gguf", MODEL[:-100])
    files.write(folder, "page.gguf", b"<html>" + MODEL)
    files.write(folder, "model.bin", MODEL)
    store = Store(folder)
    for name, reason in (("cut.gguf", "truncated"), ("page.gguf", "another kind"), ("model.bin", r"\.gguf files")):
        with pytest.raises(InvalidRequest, match=reason):
            store.locate(name)


def test_a_header_is_checked_once_for_each_version_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check costs tens of milliseconds: not again while the file is the same."""
    path = files.write(folder, "a.gguf", MODEL)
    read: list[Path] = []
    monkeypatch.setattr(gguf, "read_header", read.append)
    store = Store(folder)
    store.locate("a.gguf")
    store.locate("a.gguf")
    assert read == [path]
    os.utime(path, (1, 1))
    store.locate("a.gguf")

    assert read == [path, path]


def test_a_published_file_is_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sidecar says that it passed; a cold start need not read the header twice."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.write(path, describe(path))
    monkeypatch.setattr(gguf, "read_header", lambda _path: pytest.fail("read again"))

    assert Store(folder).locate("model.gguf") == path


def test_a_sidecar_speaks_only_for_its_file(folder: Path) -> None:
    """After size or time have changed it is not believed; it may still say whose place it is."""
    path = files.write(folder, "model.gguf", MODEL)
    known = describe(path)
    sidecar.write(path, known)
    assert sidecar.read(path) == known
    os.utime(path, ns=(known.mtime_ns, known.mtime_ns // 10**9 * 10**9))
    assert sidecar.read(path) == known, "an image layer keeps whole seconds"
    os.utime(path, ns=(1, 1))

    assert sidecar.read(path) is None
    assert sidecar.peek(path) == known


@pytest.mark.parametrize("text", ["", "[]", "{", '{"origin": 1}', "null", '"x"', "\udcff"])
def test_a_damaged_sidecar_is_none(folder: Path, text: str) -> None:
    """Whatever is in it, it does not fail and is not believed."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.path_of(path).write_bytes(text.encode("utf-8", "surrogateescape"))

    assert sidecar.read(path) is None


def test_a_hub_model_is_present_by_its_sidecar(folder: Path) -> None:
    """The branch it was fetched as, its commit, or the start of that; not another revision or repository."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.write(path, describe(path))
    store = Store(folder)

    assert store.present(HuggingFace("org/repo", "model.gguf")) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "c" * 40)) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "c" * 8)) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "v2")) is None
    assert store.present(HuggingFace("other/repo", "model.gguf")) is None


def test_a_file_without_a_sidecar_stands_for_its_name(folder: Path) -> None:
    """Put there by hand it serves the unpinned reference; nothing says that it is a given revision."""
    path = files.write(folder, "model.gguf", MODEL)
    store = Store(folder)

    assert store.present(HuggingFace("org/repo", "model.gguf")) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "v2")) is None
    assert store.present(File("model.gguf")) == path
    assert store.present(File("none.gguf")) is None
