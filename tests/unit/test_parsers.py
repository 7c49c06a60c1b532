"""What each family's recorded outputs say, however they are cut into pieces."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.interface import Arguments, Call, CallEnd, Piece, Reasoning, Text
from core.engine.output.families import FAMILIES, marker_texts
from core.engine.output.parsers import parser
from core.engine.prompt.tools import calls_text

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
of_each_family = pytest.mark.parametrize(
    "recordings",
    [[recording for recording in RECORDED if recording.family == name] for name in BY_NAME],
    ids=list(BY_NAME),
)


@each
def test_a_recording_says_its_events(recording):
    events = merged(recording.parse(whole(recording.pieces)))
    assert events == recording.events
    for index, event in enumerate(events):
        if isinstance(event, CallEnd):
            assert isinstance(events[index - 2], Call)
            assert isinstance(json.loads(events[index - 1].text), dict)


@of_each_family
def test_what_was_said_stays_true(recordings):
    """After each character a parser has said the beginning of the events, and no part of a marker."""
    for recording in recordings:
        reader = recording.parser()
        said = []
        for piece in per_character(recording.pieces):
            said += reader.feed(piece)
            assert begins(merged(said), recording.events), (recording.name, piece, said)
        assert merged([*said, *reader.finish(cut=recording.cut)]) == recording.events, recording.name


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


@of_each_family
def test_every_prefix_has_an_end(recordings):
    """A turn may end anywhere. At a cut it says the beginning of the events, unless a call never got its name."""
    for recording in recordings:
        pieces = list(per_character(recording.pieces))
        for end in range(len(pieces)):
            beginning = whole(pieces[:end])
            recording.parse(beginning, cut=False)
            events = merged(recording.parse(beginning, cut=True))
            if events and isinstance(events[-1], Text):  # white space before a call is said if none comes
                events = (*events[:-1], Text(events[-1].text.rstrip()))
            assert begins(events, recording.events) or BY_NAME[recording.family].bare, (recording.name, beginning)


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
    spelled = [family.opener, *family.variants, *family.heads, *marker_texts(family), '"name"']
    if any(opener.strip() and opener.strip() in text for opener in spelled):
        return
    reader = parser(family, TOOLS if tools else [], frozenset(), reasoning_open=False)
    events = [event for part in texts for event in reader.feed(Piece(part))] + reader.finish(cut=False)
    assert merged(events) == ((Text(text),) if text else ())


@given(st.sampled_from(FAMILIES), st.data())
def test_nothing_that_a_model_writes_is_an_error(family, data):
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


def opened(family, *pieces, markers=None, reasoning_open=False):
    """Feed pieces to a parser. Return it and what it said."""
    known = frozenset(marker_texts(BY_NAME[family]) if markers is None else markers)
    reader = parser(BY_NAME[family], TOOLS, known, reasoning_open=reasoning_open)
    said = []
    for piece in pieces:
        said += reader.feed(Piece(piece, marker=piece in known))
    return reader, merged(said)


@pytest.mark.parametrize(
    ("family", "pieces", "overrun"),
    [
        ("hermes", ["<tool_call>", "\n"], ""),
        ("hermes", ["<tool_call>", '\n{"'], '{"'),
        ("hermes", ["<tool_call>", '{"'], '{"'),
        ("lfm2", ["<|tool_call_start|>"], ""),
        ("mistral 11", ["Hi.", "[TOOL_CALLS]"], ""),
        ("gemma 4", ["<|tool_call>", "call", ":"], ""),
        ("gemma 4", ["<|tool_call>", "call", ":get_"], "get_"),
        ("harmony", ["<|channel|>", "commentary", " to", "=functions", "."], ""),
        ("harmony", ["<|channel|>", "commentary", " to", "=functions", ".get"], "get"),
        ("harmony", [" to", "=functions", ".get"], "get"),
        ("deepseek r1", ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>"], ""),
        ("qwen coder", ["<tool_call>", "\n<"], "<"),
        ("qwen coder", ["<function", "=get", "_weather", ">\n"], "<function=get_weather>\n"),  # the opener is left out
        ("llama 3", ["{", '"name', '":', ' "'], '{"name": "'),
        ("llama 3", ["\n", '{"name":"pi'], '{"name": "pi'),  # as the grammar writes it
        ("llama 3", ['{"type": "function", "', 'name": "'], '{"name": "'),
    ],
)
def test_a_call_is_open_once_its_opener_is_complete(family, pieces, overrun):
    *before, last = pieces
    reader, _ = opened(family, *before)
    assert not reader.calling
    reader, _ = opened(family, *before, last)
    assert reader.calling
    assert reader.overrun == overrun


@pytest.mark.parametrize(
    ("family", "pieces"),
    [
        ("hermes", ["<think>", "<tool_call>", "\n{"]),
        ("harmony", ["<|channel|>", "analysis", "<|message|>", "to=functions.ping"]),
        ("qwen coder", ["<function=", "unknown", ">"]),
        ("llama 3", ['{"names": "']),
        ("llama 3", ['Call {"name": "']),
    ],
)
def test_no_call_is_open_in_reasoning_or_text(family, pieces):
    reader, _ = opened(family, *pieces)
    assert not reader.calling


def test_the_call_is_open_until_its_closer():
    reader, said = opened("hermes", "<tool_call>", '\n{"name": "ping", "arguments": {}}')
    assert said == (Call("ping"), Arguments("{}"), CallEnd())
    assert reader.calling
    assert reader.feed(Piece("\n")) == []
    assert reader.calling
    assert reader.feed(Piece("</tool_call>", marker=True)) == []
    assert not reader.calling


def test_a_call_without_closer_ends_with_its_arguments():
    reader, _ = opened("mistral 11", "[TOOL_CALLS]", "ping", "[ARGS]", "{", "}")
    assert not reader.calling


def test_an_array_is_open_until_its_end():
    reader, said = opened("mistral", "[TOOL_CALLS]", '[{"name": "ping"}')
    assert said[-1] == CallEnd()
    assert reader.calling
    reader.feed(Piece("]"))
    assert not reader.calling


def test_what_is_rejected_is_text_and_more_text_follows():
    reader, said = opened("hermes", "So:\n", "<tool_call>", '\n{"a": [1')
    assert reader.calling
    assert merged([*said, *reader.reject()]) == (Text('So:\n<tool_call>\n{"a": [1'),)
    assert not reader.calling
    assert merged([*reader.feed(Piece(", 2]")), *reader.finish(cut=False)]) == (Text(", 2]"),)


@pytest.mark.parametrize("family", ["harmony", "llama 3", "qwen coder", "lfm2"])
def test_each_form_can_be_rejected(family):
    start = {
        "harmony": ["<|channel|>", "commentary", " to=functions.p"],
        "llama 3": ['{"name": "pi'],
        "qwen coder": ["<tool_call>", "\n<function=p"],
        "lfm2": ["<|tool_call_start|>", "[pi"],
    }[family]
    reader, said = opened(family, *start)
    assert reader.calling
    assert merged([*said, *reader.reject(), *reader.feed(Piece(" x"))]) == (Text("".join(start) + " x"),)
    assert not reader.calling


def test_rejecting_nothing_says_nothing():
    reader, _ = opened("hermes", "Hello")
    assert reader.reject() == []
    assert reader.feed(Piece(" you")) == [Text(" you")]


def test_a_call_can_follow_a_rejected_one():
    reader, _ = opened("hermes", "<tool_call>", "\n{")
    assert reader.reject() == [Text("<tool_call>\n{")]
    reader.feed(Piece("<tool_call>", marker=True))
    assert Call("ping") in reader.feed(Piece('\n{"name": "ping"}'))


def test_reasoning_lasts_from_its_opener_to_its_closer():
    reader, _ = opened("hermes")
    assert not reader.reasoning
    reader.feed(Piece("<think>", marker=True))
    assert reader.reasoning
    assert reader.feed(Piece("\nHm")) == [Reasoning("Hm")]
    reader.feed(Piece("</think>", marker=True))
    assert not reader.reasoning


def test_reasoning_that_the_prompt_opened_comes_first():
    reader, _ = opened("deepseek r1", reasoning_open=True)
    assert reader.reasoning


def test_text_without_tools_is_said_at_once():
    reader = parser(BY_NAME["hermes"], [], frozenset(marker_texts(BY_NAME["hermes"])), reasoning_open=False)
    assert reader.feed(Piece("Line\n")) == [Text("Line\n")]
    assert reader.feed(Piece("<tool_call>")) == [Text("<tool_call>")]


def test_without_tools_a_call_is_text():
    reader = parser(BY_NAME["llama 3"], [], frozenset(), reasoning_open=False)
    assert reader.feed(Piece('{"name": "ping"}')) == [Text('{"name": "ping"}')]


def test_arguments_are_said_as_they_come():
    reader, _ = opened("hermes", "<tool_call>", '\n{"name": "note", "arguments": {"text": "one')
    assert reader.feed(Piece(" two")) == [Arguments(" two")]
    reader, _ = opened("qwen coder", "<tool_call>", "\n<function=note>\n<parameter=text>\none")
    assert reader.feed(Piece(' "two"')) == [Arguments(' \\"two\\"')]
    reader, _ = opened("gemma 4", "<|tool_call>", "call:note{text:", '<|"|>', "one")
    assert reader.feed(Piece("\ttwo")) == [Arguments("\\ttwo")]
    reader, _ = opened("lfm2", "<|tool_call_start|>", "[note(text='one")
    assert reader.feed(Piece(' "two')) == [Arguments(' \\"two')]


def test_a_name_is_text_as_soon_as_no_tool_has_it():
    _, said = opened("hermes", "<tool_call>", '\n{"name": "pon')
    assert said == (Text('<tool_call>\n{"name": "pon'),)


@pytest.mark.parametrize("opener", ["[", '{"a":', "("])
def test_values_nested_too_deeply_are_no_arguments(opener):
    family = "lfm2" if opener == "(" else "hermes"
    start = {
        "lfm2": ["<|tool_call_start|>", "[plan(steps="],
        "hermes": ["<tool_call>", '{"name": "plan", "arguments": {"steps": '],
    }
    _, said = opened(family, *start[family], opener * 100_000)
    assert isinstance(said[-1], Text)


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 390, "-1e999", "1_0", ".5", "nan", "-inf", "1e400", "+"])
@pytest.mark.parametrize("family", ["hermes", "lfm2", "qwen coder", "gemma 4"])
def test_odd_numbers_are_numbers_or_no_arguments(family, number):
    start, end = {
        "hermes": (["<tool_call>", '{"name": "get_weather", "arguments": {"days": '], "}}"),
        "lfm2": (["<|tool_call_start|>", "[get_weather(days="], ")]"),
        "qwen coder": (["<tool_call>", "<function=get_weather><parameter=days>"], "</parameter></function>"),
        "gemma 4": (["<|tool_call>", "call:get_weather{days:"], "}"),
    }[family]
    _, said = opened(family, *start, number + end)
    if CallEnd() in said:
        json.loads(said[1].text)
    else:
        assert said[-1] == Text(number + end)


@pytest.mark.parametrize("name", ["note", "plan"])
def test_time_grows_with_the_text_alone(name):
    """The work per character does not depend on how much came before: counted in calls of Python functions."""
    value = {"note": '{"text": "', "plan": '{"steps": ['}[name]
    item = {"note": "a\\n", "plan": '{"a": 1}, '}[name]
    reader, _ = opened("hermes", "<tool_call>", f'\n{{"name": "{name}", "arguments": {value}')

    def work():
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            for character in item * 20:
                reader.feed(Piece(character))
        finally:
            sys.setprofile(None)
        return calls

    early = work()
    for character in item * 2000:
        reader.feed(Piece(character))
    assert work() <= early * 1.1
    assert len(reader._source.text) < 10


characters = st.characters(codec="utf-8") | st.sampled_from("\"'\\{}[](),:=<>/\n\t ")
strings = st.text(characters, max_size=12)
names = st.text(st.sampled_from("abcXYZ_"), min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(names, nested, max_size=3)
calls_of_tools = st.lists(
    st.tuples(st.just("note"), st.fixed_dictionaries({"text": strings, "tags": st.lists(strings, max_size=3)}))
    | st.tuples(st.just("plan"), st.fixed_dictionaries({"options": objects, "strict": st.booleans()}))
    | st.tuples(st.just("ping"), st.just({})),
    min_size=1,
    max_size=3,
)


@given(st.sampled_from(FAMILIES), calls_of_tools, st.booleans())
def test_calls_as_the_family_writes_them_are_read_back(family, calls, tokens):
    calls = calls if family.several else calls[:1]
    text = calls_text(calls, family)
    if (family.quote and family.quote in json.dumps(calls)) or "</parameter>" in json.dumps(calls):
        return  # such a string cannot be told from its end
    markers = frozenset(marker_texts(family) if tokens else ())
    reader = parser(family, TOOLS, markers, reasoning_open=False)
    events = merged(
        [event for piece in pieces_of([text], markers) for event in reader.feed(piece)] + reader.finish(cut=False)
    )
    read = [
        (event.name, json.loads(events[index + 1].text)) for index, event in enumerate(events) if type(event) is Call
    ]
    assert read == [(name, arguments) for name, arguments in calls]
    assert [type(event) for event in events] == [Call, Arguments, CallEnd] * len(calls)
