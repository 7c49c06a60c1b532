"""Find what a chat template can do: list tools, show calls and their results, keep reasoning.

Conversations with unguessable names are rendered, and the names are looked for in the output. The answers are cached
for each template's text.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TOOLS_VARIABLES = ("tools", "xml_tools", "available_tools")  # under which templates read the tools
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # of an assistant's message


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a template can do.

    `tools` is the variable under which it lists tools, or None. `calls`: it shows an assistant's calls, whose arguments
    it takes as `arguments`, in a message whose empty content is `empty`. `several`: it shows more than one call of a
    message. `results`: it shows results.
    """

    tools: str | None = None
    calls: bool = False
    arguments: Literal["object", "string"] = "object"
    empty: str | None = ""
    several: bool = False
    results: bool = False


@functools.lru_cache(maxsize=8)
def capabilities(source: str, bos: str = "", eos: str = "") -> Capabilities:
    """Return what a template can do. Call it in a worker thread: it renders the template up to 8 times."""
    probe = _Probe(source, bos, eos)
    tools = probe.tools_variable()
    arguments, empty, calls, results = probe.calls(tools)
    several = calls and probe.several(tools, arguments, empty)
    return Capabilities(tools, calls, arguments, empty, several, results)


@functools.lru_cache(maxsize=8)
def reasoning_key(source: str) -> str | None:
    """Return the key under which a template reads the reasoning of an assistant's message, or None."""
    return next((key for key in _REASONING_KEYS if re.search(rf"\.{key}\b|['\"]{key}['\"]", source)), None)


@functools.lru_cache(maxsize=8)
def shows_later_systems(source: str, bos: str = "", eos: str = "") -> bool:
    """Return whether a template shows a system message behind the first message, and the first one, too."""
    return _Probe(source, bos, eos).later_systems()


class _Probe:
    """Renders conversations with names of its own. A template that fails shows nothing."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self._source, self._bos, self._eos = source, bos, eos
        self._names = iter([f"x{os.urandom(6).hex()}" for _ in range(8)])
        self._tool, self._other, self._key, self._value, self._result = (next(self._names) for _ in range(5))
        function = {
            "name": self._tool,
            "description": "Probe",
            "parameters": {"type": "object", "properties": {self._key: {"type": "string"}}, "required": [self._key]},
        }
        self._tools = [{"type": "function", "function": function}]

    def tools_variable(self) -> str | None:
        """Return the variable under which the template lists tools."""
        messages = [{"role": "user", "content": "Hello"}]
        for name in TOOLS_VARIABLES:
            if name in self._source and self._tool in self._render(messages, name):
                return name
        return None

    def calls(self, tools: str | None) -> tuple[Literal["object", "string"], str | None, bool, bool]:
        """Return how the template takes arguments and an empty content, and whether it shows calls and results."""
        results = False
        # Some templates write any role. A model that was trained with tools knows the role of results.
        named = re.search(r"['\"](?:tool|ipython|tool_response)['\"]", self._source)
        reads_results = tools is not None or named is not None
        if "tool_calls" in self._source:
            kinds: tuple[Literal["object", "string"], ...] = ("object", "string")
            for arguments, empty in [(kind, content) for kind in kinds for content in ("", None)]:
                text = self._render([*self._call(arguments, empty, self._tool), self._answer("abcdefghi")], tools)
                results = results or (reads_results and self._result in text)
                python = f"'{self._key}'" in text  # a dict as Python shows it
                if self._tool in text.split("Hello")[-1] and self._value in text and not python:
                    return arguments, empty, True, results
        elif reads_results:
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well"}]
            results = self._result in self._render([*turns, self._answer("abcdefghi")], tools)
        return "object", "", False, results

    def later_systems(self) -> bool:
        """Return whether the template shows two system messages, the second one between turns."""
        turns = [("system", self._tool), ("user", "Hi"), ("assistant", "Hi"), ("system", self._other), ("user", "Hi")]
        text = self._render([{"role": role, "content": content} for role, content in turns], None)
        return self._tool in text and self._other in text

    def several(self, tools: str | None, arguments: Literal["object", "string"], empty: str | None) -> bool:
        """Return whether the template shows two calls of one message."""
        messages = self._call(arguments, empty, self._tool, self._other)
        text = self._render([*messages, self._answer("abcdefghi"), self._answer("bcdefghij")], tools)
        return self._tool in text and self._other in text

    def _call(self, arguments: Literal["object", "string"], empty: str | None, *names: str) -> list[dict[str, Any]]:
        value: Any = {self._key: self._value}
        calls = [
            {
                "id": "abcdefghijk"[index : index + 9],
                "type": "function",
                "function": {"name": name, "arguments": value if arguments == "object" else json.dumps(value)},
            }
            for index, name in enumerate(names)
        ]
        return [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": empty, "tool_calls": calls},
        ]

    def _answer(self, call_id: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "name": self._tool, "content": self._result}

    def _render(self, messages: list[dict[str, Any]], tools: str | None) -> str:
        from core.engine.prompt import sandbox

        variables: Mapping[str, Any] = {
            "messages": messages,
            **({} if tools is None else {tools: self._tools}),
            "add_generation_prompt": True,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        try:
            return sandbox.render(self._source, variables)
        except (sandbox.Refused, sandbox.Runaway, sandbox.Broken):
            return ""
