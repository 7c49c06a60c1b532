"""Make the parser of a sequence: which class reads which family's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from typing import Protocol as Structure

from core.engine.interface import Parser
from core.engine.output.channels import ChannelParser
from core.engine.output.families import Family
from core.engine.output.sequence import SequenceParser


class Tool(Structure):
    """A tool that may be called. `parameters` is the JSON Schema of its arguments."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...


def parser(family: Family, tools: Sequence[Tool], markers: frozenset[str], *, reasoning_open: bool) -> Parser:
    """Return the parser of one sequence.

    `markers` are those of the family's markers that are one token of the vocabulary: the others are looked for in text.
    `reasoning_open`: the prompt ends in reasoning.
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    kind = ChannelParser if family.channels else SequenceParser
    return kind(family, schemas, markers, reasoning_open=reasoning_open)
