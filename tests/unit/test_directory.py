"""Local models: which are listed, and which file a client's name refers to."""

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
    fields = {
        "origin": "hf://org/repo/model.gguf",
        "source": "huggingface",
        "sha256": "a" * 64,
        "size_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "published": "2026-11-22T00:00:00+00:00",
        "revision": "main",
        "commit": "c" * 40,
    }
    return Sidecar(**{**fields, **changes})  # type: ignore[arg-type]


def test_models_are_listed_by_name(folder: Path) -> None:
    """Subfolders are searched. Hidden files, other files and incomplete models are left out."""
    for name in ("b.gguf", "sub/a.GGUF", ".part.gguf", ".cache/x.gguf", "notes.txt"):
        files.write(folder, name, MODEL)
    for name, content in files.split_model("big", 3).items():
        files.write(folder, name, content)
    files.write(folder, "half-00001-of-00002.gguf", MODEL)

    models = Store(folder).list()

    assert [model.name for model in models] == ["b.gguf", "big-00001-of-00003.gguf", "sub/a.GGUF"]
    assert models[1].size_bytes == sum(map(len, files.split_model("big", 3).values()))


def test_a_missing_folder_holds_no_models(tmp_path: Path) -> None:
    """A new installation has no MODELS_DIR yet."""
    store = Store(tmp_path / "none")

    assert store.list() == ()
    with pytest.raises(ModelNotFound, match="MODELS_DIR is empty"):
        store.locate("a.gguf")


def test_a_model_is_found_by_its_name_or_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is relative to MODELS_DIR, absolute inside it, or relative to the working directory."""
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
    """Parent folders, absolute paths, links and invalid bytes are a 400."""
    outside = files.write(folder.parent, "outside.gguf", MODEL)
    (folder / "link.gguf").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    store = Store(folder)

    with pytest.raises(InvalidRequest) as caught:
        store.locate(name)
    assert caught.value.status == 400
    assert store.list() == ()


def test_a_name_that_is_too_long_is_not_found(folder: Path) -> None:
    """The kernel refuses a component of 300 bytes; the client gets a 404."""
    with pytest.raises(ModelNotFound):
        Store(folder).locate("x" * 300 + ".gguf")


def test_a_loop_of_links_is_not_found(folder: Path) -> None:
    """A folder that was mounted or copied wrongly breaks neither `list` nor `locate`."""
    (folder / "a.gguf").symlink_to(folder / "b.gguf")
    (folder / "b.gguf").symlink_to(folder / "a.gguf")

    assert Store(folder).list() == ()
    with pytest.raises(ModelNotFound):
        Store(folder).locate("a.gguf")


def test_the_error_for_a_missing_model_lists_those_that_exist(folder: Path) -> None:
    """It is a 404 that names the alternatives."""
    files.write(folder, "b.gguf", MODEL)
    with pytest.raises(ModelNotFound, match=r"no model 'c\.gguf'.*There are: b\.gguf"):
        Store(folder).locate("c.gguf")


def test_allowed_files_are_served_from_anywhere(folder: Path) -> None:
    """The configured, embedded or baked model may be outside MODELS_DIR, also behind a link as in a hub cache."""
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
    """The file may be truncated, of another format, or not named .gguf."""
    files.write(folder, "cut.gguf", MODEL[:-100])
    files.write(folder, "page.gguf", b"<html>" + MODEL)
    files.write(folder, "model.bin", MODEL)
    store = Store(folder)
    for name, reason in (("cut.gguf", "truncated"), ("page.gguf", "another kind"), ("model.bin", r"\.gguf files")):
        with pytest.raises(InvalidRequest, match=reason):
            store.locate(name)


def test_a_header_is_checked_once_per_version_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes tens of milliseconds, so it is not repeated while the file is unchanged."""
    path = files.write(folder, "a.gguf", MODEL)
    read: list[Path] = []
    read_header = gguf.read_header
    monkeypatch.setattr(gguf, "read_header", lambda path: read.append(path) or read_header(path))
    store = Store(folder)
    store.locate("a.gguf")
    store.locate("a.gguf")
    assert read == [path]
    os.utime(path, (1, 1))
    store.locate("a.gguf")

    assert read == [path, path]


def test_a_published_file_is_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sidecar records the check, so a cold start does not read the header twice."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.write(path, describe(path))
    monkeypatch.setattr(gguf, "read_header", lambda _path: pytest.fail("read again"))

    assert Store(folder).locate("model.gguf") == path


def test_a_sidecar_is_valid_only_for_its_file(folder: Path) -> None:
    """`read` ignores it once size or mtime have changed. `peek` still returns it, because it names the file's owner."""
    path = files.write(folder, "model.gguf", MODEL)
    expected = describe(path)
    sidecar.write(path, expected)
    assert sidecar.read(path) == expected
    os.utime(path, ns=(expected.mtime_ns, expected.mtime_ns // 10**9 * 10**9))
    assert sidecar.read(path) == expected, "image layers store whole seconds"
    os.utime(path, ns=(1, 1))

    assert sidecar.read(path) is None
    assert sidecar.peek(path) == expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"origin": 1}', "null", '"x"', "\udcff"])
def test_a_damaged_sidecar_is_none(folder: Path, text: str) -> None:
    """Invalid content is ignored and raises nothing."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.path_of(path).write_bytes(text.encode("utf-8", "surrogateescape"))

    assert sidecar.read(path) is None


def test_a_hub_model_is_present_by_its_sidecar(folder: Path) -> None:
    """The branch, the commit or a prefix of the commit match; another revision or repository does not."""
    path = files.write(folder, "model.gguf", MODEL)
    sidecar.write(path, describe(path))
    store = Store(folder)

    assert store.present(HuggingFace("org/repo", "model.gguf")) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "c" * 40)) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "c" * 8)) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "v2")) is None
    assert store.present(HuggingFace("other/repo", "model.gguf")) is None


def test_a_file_without_a_sidecar_matches_its_name(folder: Path) -> None:
    """A file copied by hand serves the reference without a revision; its revision is unknown."""
    path = files.write(folder, "model.gguf", MODEL)
    store = Store(folder)

    assert store.present(HuggingFace("org/repo", "model.gguf")) == path
    assert store.present(HuggingFace("org/repo", "model.gguf", "v2")) is None
    assert store.present(File("model.gguf")) == path
    assert store.present(File("none.gguf")) is None
