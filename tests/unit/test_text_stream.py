"""TextStream: whole characters, stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.generation import TextStream


def feed(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    stream = TextStream(stops)
    out = [stream.push(piece) for piece in pieces]
    return out, "".join(out) + stream.finish(), stream.stopped


def test_a_character_split_over_tokens_leaves_whole() -> None:
    """A piece never shows half of an emoji or of a CJK character."""
    data = "a😀語".encode()
    out, whole, _ = feed([data[i : i + 1] for i in range(len(data))])

    assert out == ["a", "", "", "", "😀", "", "", "語"]
    assert whole == "a😀語"


def test_a_character_that_never_ends_is_dropped() -> None:
    """A cut by the limit in the middle of a character shows neither bytes nor U+FFFD."""
    _, whole, _ = feed([b"ok ", "😀".encode()[:2]])

    assert whole == "ok "


def test_the_earliest_stop_string_wins() -> None:
    """Not the first listed one, as in llama-cpp-python, but the first in the text."""
    _, whole, stopped = feed([b"one two three"], ("three", "two"))

    assert (whole, stopped) == ("one ", True)


def test_a_stop_string_over_token_borders_never_leaks() -> None:
    """What may begin a stop string is held back until it is decided."""
    out, whole, stopped = feed([b"Hi ", b"<", b"/s", b">", b"more"], ("</s>",))

    assert out == ["Hi ", "", "", "", ""]
    assert (whole, stopped) == ("Hi ", True)


def test_held_text_comes_out_when_it_is_no_stop_string() -> None:
    """A false start of a stop string is text like any other."""
    out, whole, stopped = feed([b"a<", b"b"], ("</s>",))

    assert out == ["a", "<b"]
    assert (whole, stopped) == ("a<b", False)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_into_tokens_gives_the_same_text(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the bytes are cut, the result is the text up to the earliest stop string."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    _, whole, stopped = feed(pieces, tuple(stops))

    found = [at for at in map(text.find, stops) if at >= 0]
    # A stop string may end before an earlier-beginning, longer one is complete: then that one wins.
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert bool(found) == stopped
    if not found:
        assert text == whole
    else:
        assert text.startswith(whole)
        assert len(whole) <= ends[0][1]
        assert not any(stop in whole for stop in stops)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3("])
def test_bytes_that_cannot_be_utf8_become_replacement_characters(bad: bytes) -> None:
    """A model may emit rubbish; clients get valid JSON all the same."""
    _, whole, _ = feed([b"a", bad, b"b"])

    assert "\ufffd" in whole
