"""TextStream emits whole characters and ends at stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.output.reader import TextStream


def feed(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    stream = TextStream(stops)
    out = [stream.push(piece) for piece in pieces]
    return out, "".join(out) + stream.finish(), stream.stop is not None


def test_a_character_split_over_tokens_is_emitted_whole() -> None:
    """A piece never holds half of an emoji or CJK character."""
    data = "a😀語".encode()
    out, whole, _ = feed([data[i : i + 1] for i in range(len(data))])

    assert out == ["a", "", "", "", "😀", "", "", "語"]
    assert whole == "a😀語"


def test_an_incomplete_last_character_is_dropped() -> None:
    """An answer cut in the middle of a character shows neither bytes nor U+FFFD."""
    _, whole, _ = feed([b"ok ", "😀".encode()[:2]])

    assert whole == "ok "


def test_the_earliest_stop_string_wins() -> None:
    """The first one in the text counts, not the first one listed as in llama-cpp-python."""
    _, whole, stopped = feed([b"one two three"], ("three", "two"))

    assert (whole, stopped) == ("one ", True)


def test_a_stop_string_split_over_tokens_never_leaks() -> None:
    """Text that may begin a stop string is held back."""
    out, whole, stopped = feed([b"Hi ", b"<", b"/s", b">", b"more"], ("</s>",))

    assert out == ["Hi ", "", "", "", ""]
    assert (whole, stopped) == ("Hi ", True)


def test_held_back_text_is_emitted_when_it_is_no_stop_string() -> None:
    """The beginning of a stop string without its end is ordinary text."""
    out, whole, stopped = feed([b"a<", b"b"], ("</s>",))

    assert out == ["a", "<b"]
    assert (whole, stopped) == ("a<b", False)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_into_tokens_gives_the_same_text(text: str, stops: list[str], data: st.DataObject) -> None:
    """The result is the text up to the earliest stop string."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    _, whole, stopped = feed(pieces, tuple(stops))

    positions = [at for at in map(text.find, stops) if at >= 0]
    # A stop string may end before a longer one that begins earlier: then the shorter one wins.
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert bool(positions) == stopped
    if not positions:
        assert text == whole
    else:
        assert text.startswith(whole)
        assert len(whole) <= ends[0][1]
        assert not any(stop in whole for stop in stops)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3("])
def test_bytes_that_cannot_be_utf8_become_replacement_characters(bad: bytes) -> None:
    """A model may emit invalid UTF-8; clients still get valid JSON."""
    _, whole, _ = feed([b"a", bad, b"b"])

    assert "\ufffd" in whole
