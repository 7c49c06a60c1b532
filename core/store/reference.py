"""Parse the names of models: a local file, `hf://org/repo/file.gguf@revision` or `s3://bucket/key`.

The last two may end in `#sha256:<64 hex digits>` (comma-separated for the parts of a split model). This is a *pin*: the
bytes must have this sha256, whatever Hugging Face, a bucket or a manifest claims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeVar

from core.errors import InvalidRequest

FORMS = "a file in MODELS_DIR, hf://org/repo/file.gguf@revision or s3://bucket/key.gguf"

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_PIN = re.compile(r"(?P<name>.*)#sha256:(?P<digests>[^#]*)", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # valid in JSON, but in no file system
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class File:
    """A path. A relative one is looked up in MODELS_DIR, then in the working directory."""

    path: str
    sha256: tuple[str, ...] = ()  # one for each file of the model, or none

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class HuggingFace:
    repo_id: str  # "org/repo"
    filename: str  # may hold folders
    revision: str = "main"  # branch, tag or commit
    sha256: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"hf://{self.repo_id}/{self.filename}@{self.revision}{_fragment(self.sha256)}"


@dataclass(frozen=True, slots=True)
class S3:
    bucket: str
    key: str
    sha256: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}{_fragment(self.sha256)}"


Reference = File | HuggingFace | S3
R = TypeVar("R", bound=Reference)


def parse(reference: str) -> Reference:
    """Return the reference. Raise InvalidRequest if it has none of the three forms."""
    if not reference or len(reference) > 1024 or _CONTROL.search(reference) or _SURROGATE.search(reference):
        raise InvalidRequest(f"A model is named by {FORMS}; got {quote_path(reference)}.")
    scheme, separator, rest = reference.partition("://")
    if not separator:
        return File(reference)
    digests: tuple[str, ...] = ()
    if (fragment := _PIN.fullmatch(rest)) is not None:
        rest, digests = fragment["name"], tuple(fragment["digests"].lower().split(","))
    match scheme:
        case "hf":
            return pin(_parse_hub(reference, rest), digests)
        case "s3":
            bucket, _, key = rest.partition("/")
            return pin(s3(bucket, key), digests)
    raise InvalidRequest(f"{quote_path(scheme + '://')} is not a source of models; use {FORMS}.")


def hugging_face(repo_id: str, filename: str, revision: str = "main") -> HuggingFace:
    """Return a valid Hugging Face reference from the fields of /load. Raise InvalidRequest naming the field."""
    organisation, slash, repo = repo_id.partition("/")
    if not slash or not _repo_part(organisation) or not _repo_part(repo):
        raise InvalidRequest(f"'repo_id' must be \"org/repo\", got {_quote(repo_id)}.", param="repo_id")
    if not _is_model_path(filename):
        raise InvalidRequest(
            f"'filename' must be a .gguf file of the repository, without '..', got {_quote(filename)}.",
            param="filename",
        )
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/"):
        raise InvalidRequest(
            f"'revision' must be a branch, tag or commit of the repository, got {_quote(revision)}.", param="revision"
        )
    return HuggingFace(repo_id, filename, revision)


def s3(bucket: str, key: str) -> S3:
    """Return a valid S3 reference. Raise InvalidRequest."""
    if not _BUCKET.fullmatch(bucket) or ".." in bucket or not _is_model_path(key):
        raise InvalidRequest(
            f"An S3 model is named s3://bucket/path/file.gguf, without '..', got {_quote(f's3://{bucket}/{key}')}."
        )
    return S3(bucket, key)


def pin(reference: R, sha256: tuple[str, ...]) -> R:
    """Return `reference` with the digests that its files must have. Without digests it is unchanged.

    Raise InvalidRequest unless they are digests, one for each file, and equal to those it is pinned to already.
    """
    if not sha256 or sha256 == reference.sha256:
        return reference
    if reference.sha256:
        raise InvalidRequest(f"{quote_path(str(reference))} is pinned to another sha256 already.", param="sha256")
    for digest in sha256:
        if not _SHA256.fullmatch(digest):
            raise InvalidRequest(f"A sha256 has 64 hexadecimal digits, got {_quote(digest)}.", param="sha256")
    match reference:
        case File(path):
            name = path
        case HuggingFace():
            name = reference.filename
        case S3():
            name = reference.key
    count = len(split_files(name.rpartition("/")[2]))
    if len(sha256) != count:
        raise InvalidRequest(
            f"The model has {count} file{'s' if count > 1 else ''}, and {len(sha256)} sha256 "
            f"{'are' if len(sha256) > 1 else 'is'} given: name one for each file, or leave them out.",
            param="sha256",
        )
    return replace(reference, sha256=sha256)


def is_commit(revision: str) -> bool:
    """Return whether it is a full git commit id, which never changes its meaning."""
    return _COMMIT.fullmatch(revision) is not None


def split_part(filename: str) -> tuple[int, int] | None:
    """Return (part, count) of a name like `model-00001-of-00003.gguf`, or None for any other name."""
    match = _SPLIT.fullmatch(filename)
    if match is None:
        return None
    part, count = int(match["part"]), int(match["count"])
    return (part, count) if 1 <= part <= count else None


def split_files(filename: str) -> tuple[str, ...]:
    """Return all files of the model that `filename` belongs to, in order: just itself unless the model is split.

    Raise InvalidRequest over 1000 parts: no such model exists, and a name must not cost 99999 look-ups.
    """
    part_of = split_part(filename)
    if part_of is None:
        return (filename,)
    count = part_of[1]
    if count > 1000:
        raise InvalidRequest(f"{quote_path(filename)} claims {count} parts; at most 1000 are supported.")
    stem = filename[: -len("-00001-of-00001.gguf")]
    suffix = filename[-len(".gguf") :]
    return tuple(f"{stem}-{part:05d}-of-{count:05d}{suffix}" for part in range(1, count + 1))


def model_name(filename: str) -> str:
    """Return the model name for clients: without folders, .gguf and part number."""
    base = filename.rsplit("/", 1)[-1]
    match = _SPLIT.fullmatch(base)
    if match is not None and split_part(base) is not None:
        return match["stem"]
    return base[: -len(".gguf")] if base.lower().endswith(".gguf") else base


def _parse_hub(reference: str, rest: str) -> HuggingFace:
    path, at, revision = rest.rpartition("@")
    if not at:
        path, revision = rest, "main"
    parts = path.split("/", 2)
    if len(parts) != 3:
        raise InvalidRequest(
            f"A model on Hugging Face is named hf://org/repo/file.gguf@revision, got {_quote(reference)}."
        )
    return hugging_face(f"{parts[0]}/{parts[1]}", parts[2], revision)


def _repo_part(name: str) -> bool:
    return _REPO.fullmatch(name) is not None and ".." not in name and "--" not in name and not name.endswith((".", "-"))


def _is_model_path(path: str) -> bool:
    """Return whether it is a safe relative path to a .gguf file, usable under MODELS_DIR and in a URL."""
    if len(path) > 512 or "\\" in path or _CONTROL.search(path) or not path.lower().endswith(".gguf"):
        return False
    if not path.isprintable():  # also rejects lone surrogates
        return False
    segments = path.split("/")
    # A leading dot would collide with the store's own files. File systems allow 255 bytes; the store adds suffixes.
    return all(segment and not segment.startswith(".") and len(segment.encode()) <= 200 for segment in segments)


def _fragment(sha256: tuple[str, ...]) -> str:
    return f"#sha256:{','.join(sha256)}" if sha256 else ""


def quote_path(path: str) -> str:
    """Return a path for an error message: of an absolute one only the name, because clients may see the message."""
    return _quote(path.rstrip("/").rpartition("/")[2] if path.startswith("/") else path)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
