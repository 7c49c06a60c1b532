"""References: which texts name a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.store import reference as ref


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.gguf", ref.File("model.gguf")),
        ("/models/a b.gguf", ref.File("/models/a b.gguf")),
        ("hf://org/repo/file.gguf", ref.HuggingFace("org/repo", "file.gguf", "main")),
        ("hf://org/repo/q4/file.gguf@v1.0", ref.HuggingFace("org/repo", "q4/file.gguf", "v1.0")),
        ("hf://org/repo/file.gguf@refs/pr/1", ref.HuggingFace("org/repo", "file.gguf", "refs/pr/1")),
        ("s3://bucket/some/key.gguf", ref.S3("bucket", "some/key.gguf")),
    ],
)
def test_the_three_forms_are_parsed(text: str, expected: ref.Reference) -> None:
    """They are a local file, a file on Hugging Face with or without a revision, and an S3 object."""
    assert expected == ref.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b.gguf",
        "line\nbreak.gguf",
        "\ud800.gguf",
        "x" * 2000,
        "http://example.com/model.gguf",
        "hf://repo/file.gguf",
        "hf://org/repo",
        "hf://org/repo/",
        "hf://org/repo/../../etc/passwd.gguf",
        "hf://org/repo/.hidden.gguf",
        "hf://org/repo//file.gguf",
        "hf://org/repo/file.bin",
        "hf://org/../file.gguf",
        "hf://org/repo/file.gguf@",
        "hf://org/repo/file.gguf@../main",
        "hf://org/repo/file.gguf@a b",
        "hf://org/re%2Fpo/file.gguf",
        "hf://org/repo/" + "d/" * 300 + "file.gguf",
        "hf://org/repo/a\\b.gguf",
        "s3://bucket",
        "s3://Bucket/key.gguf",
        "s3://bucket/../key.gguf",
        "s3:///key.gguf",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    """This includes names that would leave their folder or URL."""
    with pytest.raises(InvalidRequest):
        ref.parse(text)


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_a_printed_reference_parses_to_itself(repo: str, filename: str, revision: str) -> None:
    """Accepted filenames have no parent folders."""
    try:
        parsed = ref.hugging_face(repo, filename, revision)
    except InvalidRequest:
        return

    assert parsed == ref.parse(str(parsed))
    assert ".." not in parsed.filename.split("/")


def test_any_part_names_all_parts_of_a_split_model() -> None:
    """The parts are in order, and the model's name has no part number."""
    names = ref.split_files("q4/big-00002-of-00003.gguf")

    assert names == tuple(f"q4/big-{part:05d}-of-00003.gguf" for part in (1, 2, 3))
    assert ref.model_name(names[0]) == "big"
    assert ref.model_name("folder/small.Q4_K_M.gguf") == "small.Q4_K_M"


@pytest.mark.parametrize("name", ["a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf", "a.gguf"])
def test_other_names_are_single_files(name: str) -> None:
    """Only a valid part number makes a split model."""
    assert ref.split_files(name) == (name,)


def test_a_split_model_of_absurdly_many_parts_is_refused() -> None:
    """One name must not cause a hundred thousand lookups."""
    with pytest.raises(InvalidRequest, match="99999 parts"):
        ref.split_files("a-00001-of-99999.gguf")
