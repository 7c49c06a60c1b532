"""What each family's recorded outputs say, however they are cut into pieces."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.interface import Arguments, Call, CallEnd, Piece, Reasoning, Text
from core.engine.output.families import FAMILIES
from core.engine.output.parsers import parser

RECORDINGS = Path(__file__).parent.parent / "recordings"
BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict


TOOLS = [Tool(name, schema) for name, schema in json.loads((RECORDINGS / "tools.json").read_text()).items()]


@dataclass(frozen=True)
class Recording:
    """What a model wrote, as pieces of whole text and markers, and what it says."""

    family: str
    name: str
    markers: frozenset
    pieces: tuple
    events: tuple
    reasoning_open: bool
    cut: bool

    def parser(self):
        return parser(BY_NAME[self.family], TOOLS, self.markers, reasoning_open=self.reasoning_open)

    def parse(self, pieces, *, cut=None):
        reader = self.parser()
        events = [event for piece in pieces for event in reader.feed(piece)]
        return [*events, *reader.finish(cut=self.cut if cut is None else cut)]


def load():
    for path in sorted(RECORDINGS.glob("*.json")):
        if path.name == "tools.json":
            continue
        document = json.loads(path.read_text())
        for case in document["cases"]:
            # In one vocabulary all markers are tokens, in another all of them are text.
            vocabularies = {"tokens": document["markers"], "text": []}
            for vocabulary in case.get("vocabularies", ["tokens", "text"] if document["markers"] else ["text"]):
                markers = vocabularies[vocabulary]
                yield Recording(
                    document["family"],
                    f"{case['name']} ({vocabulary})",
                    frozenset(markers),
                    tuple(pieces_of(case["output"], markers)),
                    tuple(map(event_of, case["events"])),
                    case.get("reasoning_open", False),
                    case.get("cut", False),
                )


def pieces_of(output, markers):
    """Cut an output at its markers. {"text": ...} is text, even if it spells one."""
    pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")
    for part in output:
        if isinstance(part, dict):
            yield Piece(part["text"])
            continue
        end = 0
        for match in pattern.finditer(part):
            yield Piece(part[end : match.start()])
            yield Piece(match.group(), marker=True)
            end = match.end()
        yield Piece(part[end:])


def event_of(entry):
    kinds = {"text": Text, "reasoning": Reasoning, "call": Call, "arguments": Arguments, "end": CallEnd}
    return kinds[entry[0]](*entry[1:])


def merged(events):
    """Put texts, reasoning and arguments together that follow each other."""
    result = []
    for event in events:
        if result and type(event) is type(result[-1]) and isinstance(event, Text | Reasoning | Arguments):
            result[-1] = type(event)(result[-1].text + event.text)
        else:
            result.append(event)
    return tuple(result)


def per_character(pieces):
    for piece in pieces:
        yield from [piece] if piece.marker else map(Piece, piece.text)


def whole(pieces):
    """Join pieces of text. Markers stay pieces."""
    joined = []
    for piece in pieces:
        if joined and not piece.marker and not joined[-1].marker:
            joined[-1] = Piece(joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined


RECORDED = list(load())
each = pytest.mark.parametrize("recording", RECORDED, ids=lambda recording: f"{recording.family}: {recording.name}")


@each
def test_a_recording_says_its_events(recording):
    events = merged(recording.parse(whole(recording.pieces)))
    assert events == recording.events
    for index, event in enumerate(events):
        if isinstance(event, CallEnd):
            assert isinstance(events[index - 2], Call)
            assert isinstance(json.loads(events[index - 1].text), dict)


@each
def test_what_was_said_stays_true(recording):
    """After each character the parser has said the beginning of the events, and no part of a marker."""
    reader = recording.parser()
    said = []
    for piece in per_character(recording.pieces):
        said += reader.feed(piece)
        assert begins(merged(said), recording.events), (piece, said)
    assert merged([*said, *reader.finish(cut=recording.cut)]) == recording.events


@given(st.data())
def test_random_pieces_say_the_same(data):
    recording = data.draw(st.sampled_from(RECORDED))
    pieces = []
    for piece in whole(recording.pieces):
        if piece.marker:
            pieces.append(piece)
            continue
        cuts = sorted(data.draw(st.sets(st.integers(0, len(piece.text)), max_size=8)))
        pieces += [Piece(piece.text[i:j]) for i, j in zip([0, *cuts], [*cuts, len(piece.text)], strict=True)]
    assert merged(recording.parse(pieces)) == recording.events


@each
def test_every_prefix_has_an_end(recording):
    """A turn may end anywhere. At a cut it says the beginning of the events, unless a call never got its name."""
    pieces = list(per_character(recording.pieces))
    for end in range(len(pieces)):
        beginning = whole(pieces[:end])
        recording.parse(beginning, cut=False)
        events = merged(recording.parse(beginning, cut=True))
        if events and isinstance(events[-1], Text):  # the white space before a call belongs to the text if none comes
            events = (*events[:-1], Text(events[-1].text.rstrip()))
        assert begins(events, recording.events) or BY_NAME[recording.family].bare, (beginning, events)


def begins(said, events):
    """Whether `events` may begin with what was said: the last text may be incomplete."""
    if not said:
        return True
    *before, last = said
    if tuple(before) != events[: len(before)] or len(before) >= len(events):
        return False
    other = events[len(before)]
    if isinstance(last, Text | Reasoning | Arguments):
        return type(other) is type(last) and other.text.startswith(last.text)
    return other == last


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.text(st.sampled_from("ab <>|[]{}()\"'\\:,=/_\n`éÿ👍tcol")) | st.text(), max_size=12),
    st.booleans(),
)
def test_no_text_is_lost_or_doubled(family, texts, tools):
    """Text that spells no opener comes out as it went in."""
    text = "".join(texts)
    spelled = [family.opener, *family.variants, *family.heads, family.section, family.section_closer]
    if any(opener.strip() and opener.strip() in text for opener in spelled) or "name" in text or "think" in text:
        return
    reader = parser(family, TOOLS if tools else [], frozenset(), reasoning_open=False)
    events = [event for part in texts for event in reader.feed(Piece(part))] + reader.finish(cut=False)
    assert merged(events) == ((Text(text),) if text else ())


@given(st.sampled_from(FAMILIES), st.data())
def test_nothing_that_a_model_writes_is_an_error(family, data):
    from core.engine.output.families import marker_texts

    markers = marker_texts(family)
    words = [
        '{"name": "',
        "ping",
        "get_weather",
        '", "arguments": ',
        '{"city": ',
        '"x"',
        "}",
        "[",
        "]",
        "(",
        ")",
        "city=",
    ]
    words += [
        "<function=",
        ">",
        "<parameter=city>",
        "\n",
        "</parameter>",
        "</function>",
        " ",
        ",",
        ":",
        "to=functions.",
    ]
    words += [
        "\\",
        "\\u12",
        "'",
        "```json",
        "commentary",
        "call:",
        "city:",
        "functions",
        "\ufffd",
        "1e999",
        "-",
        "\x00",
    ]
    texts = st.sampled_from(words).map(Piece)
    pieces = st.lists(texts | st.sampled_from(markers).map(lambda m: Piece(m, marker=True)) if markers else texts)
    reader = parser(family, TOOLS, frozenset(markers), reasoning_open=data.draw(st.booleans()))
    events = [event for piece in data.draw(pieces) for event in reader.feed(piece)]
    events += reader.finish(cut=data.draw(st.booleans()))
    for index, event in enumerate(merged(events)):
        if isinstance(event, CallEnd):
            assert isinstance(json.loads(merged(events)[index - 1].text), dict)
