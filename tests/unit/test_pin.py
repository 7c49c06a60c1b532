"""Pins: a configured SHA-256 is checked against the bytes, whatever a hub, bucket or manifest claims."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from core.errors import InvalidRequest, ModelUnavailable
from core.selection import select
from core.settings import Settings, SettingsError
from core.store import reference as ref
from core.store.reference import S3, File, HuggingFace
from core.store.source import Partial, Progress, RemoteFile, RemoteModel
from core.store.store import Store
from tests import gguf_files as files

GOOD, EVIL = files.padded_model(5000), files.padded_model(5000, seed=1)
GOOD_SHA256, EVIL_SHA256 = (hashlib.sha256(content).hexdigest() for content in (GOOD, EVIL))
HUB = HuggingFace("org/repo", "m.gguf")
BUCKET = S3("bucket", "m.gguf")


class Bucket:
    """A source of `content` that claims the SHA-256 `claimed`."""

    name, authority = "s3", False

    def __init__(self, content: bytes, claimed: str | None) -> None:
        self.content, self.claimed = content, claimed

    def resolve(self, reference: HuggingFace | S3, *, refresh: bool, **_: object) -> RemoteModel:
        file = RemoteFile("m.gguf", len(self.content), self.claimed, '"etag"')
        return RemoteModel(self.name, reference, (file,), "c" * 40 if isinstance(reference, HuggingFace) else None)

    def download(
        self, _remote: RemoteModel, _file: RemoteFile, partial: Partial, *, progress: Progress, cancelled: object
    ) -> bool:
        os.pwrite(partial.fd, self.content, 0)
        partial.landed(len(self.content))
        return False


def store(folder: Path, content: bytes, claimed: str | None = None) -> Store:
    return Store(folder, (Bucket(content, claimed),), target="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize("reference", [HUB, BUCKET])
@pytest.mark.parametrize("pinned", [GOOD_SHA256, None])
def test_bytes_that_do_not_match_the_manifest_are_not_published(
    tmp_path: Path, reference: HuggingFace | S3, pinned: str | None
) -> None:
    """This holds with and without a pin."""
    with pytest.raises(ModelUnavailable, match=f"sha256 {EVIL_SHA256}, expected {GOOD_SHA256}"):
        store(tmp_path, EVIL, GOOD_SHA256).fetch(reference, sha256=pinned)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reference", [HUB, BUCKET])
def test_a_pinned_reference_is_opened_only_if_it_matches(tmp_path: Path, reference: HuggingFace | S3) -> None:
    """`present`, `open` and `fetch` check the pin of a reference."""
    right, wrong = ref.pin(reference, (EVIL_SHA256,)), ref.pin(reference, (GOOD_SHA256,))
    with pytest.raises(InvalidRequest, match=f"is {EVIL_SHA256}, not {GOOD_SHA256}"):
        store(tmp_path, EVIL).open(wrong)
    assert store(tmp_path, EVIL).open(right).sha256 == EVIL_SHA256

    # The file on the disk does not satisfy the other pin, with or without a refresh.
    assert store(tmp_path, EVIL).present(wrong) is None
    with pytest.raises(InvalidRequest, match="as asked"):
        store(tmp_path, EVIL).fetch(wrong, refresh=False)
    assert Store(tmp_path).fetch(right, refresh=False).status == "present"


def test_a_file_without_a_sidecar_is_hashed(tmp_path: Path) -> None:
    """A file that was copied by hand matches a pin only by its bytes."""
    files.write(tmp_path, "m.gguf", EVIL)

    assert Store(tmp_path).present(ref.pin(HUB, (GOOD_SHA256,))) is None
    assert Store(tmp_path).present(ref.pin(HUB, (EVIL_SHA256,))) == tmp_path / "m.gguf"


def test_model_sha256_is_checked_for_a_local_file(tmp_path: Path) -> None:
    """The error names the file's digest. A file that changes later is hashed again."""
    path = files.write(tmp_path, "m.gguf", EVIL)
    settings = Settings(models_dir=tmp_path, model_path="m.gguf", model_sha256=(GOOD_SHA256,))
    selection = select(settings, Store(tmp_path))
    assert selection.reference is None
    assert selection.error is not None
    assert f"{EVIL_SHA256}, not {GOOD_SHA256}" in selection.error

    path.write_bytes(GOOD)
    models = Store(tmp_path)
    selection = select(settings, models)
    assert selection.is_local
    assert isinstance(selection.reference, File)
    assert models.open(selection.reference).path == path
    path.write_bytes(EVIL)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InvalidRequest, match="MODEL_SHA256"):
        models.open(selection.reference)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(model_path="hf://org/repo/m.gguf@main", model_sha256=(GOOD_SHA256,)),
        Settings(model_path=f"hf://org/repo/m.gguf#sha256:{GOOD_SHA256.upper()}"),
        Settings(auto_repo_id="org/repo", auto_filename="m.gguf", model_sha256=(GOOD_SHA256,)),
    ],
)
def test_the_settings_pin_their_model(tmp_path: Path, settings: Settings) -> None:
    """The pin is MODEL_SHA256 or part of the reference."""
    assert select(settings, Store(tmp_path)).reference == ref.pin(HUB, (GOOD_SHA256,))


def test_a_pin_is_part_of_a_references_text() -> None:
    """It has one digest per file, and `parse` reads what `str` writes."""
    split = ref.parse(f"hf://org/repo/big-00001-of-00002.gguf@v1#sha256:{'a' * 64},{'b' * 64}")

    assert split == HuggingFace("org/repo", "big-00001-of-00002.gguf", "v1", ("a" * 64, "b" * 64))
    for each in (split, ref.pin(HUB, (GOOD_SHA256,)), ref.pin(BUCKET, (GOOD_SHA256,))):
        assert ref.parse(str(each)) == each
    assert ref.parse("a#sha256:b.gguf") == File("a#sha256:b.gguf")


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/repo/m.gguf#sha256:",
        "hf://org/repo/m.gguf#sha256:abc",
        f"hf://org/repo/m.gguf#sha256:{'a' * 64},{'a' * 64}",
        f"hf://org/repo/big-00001-of-00002.gguf#sha256:{'a' * 64}",
        f"s3://bucket/m.gguf#sha256:{'g' * 64}",
    ],
)
def test_an_invalid_pin_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ref.parse(text)
    assert caught.value.param == "sha256"


def test_contradicting_pins_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="another sha256"):
        store(tmp_path, GOOD).fetch(ref.pin(HUB, (GOOD_SHA256,)), sha256=EVIL_SHA256)


@pytest.mark.parametrize("value", ["abc", "a" * 63, f"{'a' * 64},x"])
def test_model_sha256_is_checked_at_the_start(value: str) -> None:
    with pytest.raises(SettingsError, match="MODEL_SHA256 must be 64 hexadecimal digits"):
        Settings.from_env({"MODEL_SHA256": value})


@pytest.mark.parametrize("variable", ["S3_ENDPOINT_URL", "HF_ENDPOINT"])
@pytest.mark.parametrize(
    "value",
    [
        "minio:9000",
        "foo",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host:x",
        "http://u:p@host",
        "http://ho\\st",
        "https://host?a=b",
        "https://host/#a",
        "http://[::1",
        "//host",
    ],
)
def test_an_invalid_endpoint_stops_the_start(variable: str, value: str) -> None:
    """Otherwise the first download would fail after five attempts."""
    with pytest.raises(SettingsError, match=f"{variable} must be an address such as"):
        Settings.from_env({variable: value})


@pytest.mark.parametrize("value", ["https://hub.example/", "http://minio:9000", "http://[::1]:9000", "https://h/a/b"])
def test_an_endpoint_loses_its_last_slash(value: str) -> None:
    settings = Settings.from_env({"S3_ENDPOINT_URL": value, "HF_ENDPOINT": value})

    assert settings.s3_endpoint_url == settings.hf_endpoint == value.rstrip("/")
