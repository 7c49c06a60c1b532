"""Send the benchmark's requests and compute metrics from the answers. Every server gets the same requests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.bench.client import RequestFailed, count_prompt, stream, stream_many
from infra.bench.contender import Contender

DECODE_TOKENS = 128
CLIENTS = 4
CLIENT_TOKENS = 64
CONSTRAINED_TOKENS = 96
EXTRACT_TOKENS = 256
PROMPT_TOKENS = 1000

WORDS = (
    "the of and to in a is that for it as was with be by on not he this are or his from at which but have an they you "
    "were her she all would there been one their we him has more when who will no if out so what time up go about than "
    "into could state only new year some take come these know see use get like then first any work now may such give "
    "over think most even find day also after way many must look before great back through long where much should well"
)

INVOICE = (
    "Invoice 4711 of 3 March 2024. Seller: Nordlicht Tools GmbH, Hamburg. Buyer: Ada Byron, 12 St James's Square, "
    "London. Two cordless drills at 89.50 EUR each and one workbench at 240 EUR. Shipping is free. Total 419.00 EUR, "
    "payable within 14 days. Not yet paid."
)
INVOICE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "invoice_number": {"type": "integer"},
        "seller": {"type": "string", "maxLength": 40},
        "buyer": {"type": "string", "maxLength": 40},
        "currency": {"enum": ["EUR", "USD", "GBP"]},
        "items": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "quantity": {"type": "integer"},
                    "price": {"type": "number"},
                },
                "required": ["name", "quantity", "price"],
                "additionalProperties": False,
            },
        },
        "paid": {"type": "boolean"},
    },
    "required": ["invoice_number", "seller", "buyer", "currency", "items", "paid"],
    "additionalProperties": False,
}

STORY = "Write a long story about the keeper of a lighthouse, the storm of that winter and the ship that came in it."
FREE_TEXT_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "story": {"type": "string", "minLength": 400}},
    "required": ["title", "story"],
    "additionalProperties": False,
}
POINT_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
STRUCTURE_SCHEMA: Mapping[str, Any] = {
    "type": "array",
    "minItems": 12,
    "maxItems": 16,
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "mood": {"enum": ["calm", "tense", "joyful", "sad"]},
            "at_sea": {"type": "boolean"},
            "place": POINT_SCHEMA,
        },
        "required": ["id", "mood", "at_sea", "place"],
        "additionalProperties": False,
    },
}


def chat(content: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """Return a chat request with one user message and temperature 0. Servers without `include_usage` ignore it."""
    messages = [{"role": "user", "content": content}]
    options = {"stream_options": {"include_usage": True}}
    return {"messages": messages, "temperature": 0, "max_tokens": max_tokens, **options, **fields}


FIRST = chat("Say hello.", 4)  # the first request after a start


def long_text(words: int, seed: int) -> str:
    """Return `words` common words. Texts with different seeds differ from the start, so they share no cached prefix."""
    return " ".join(random.Random(seed).choices(WORDS.split(), k=words))  # noqa: S311 - text, not a secret


@dataclass(frozen=True, slots=True)
class Target:
    """One running server."""

    port: int
    contender: Contender


@dataclass(slots=True)
class Workload:
    """All requests of a round. `words` is the number of words of `long_text` that give PROMPT_TOKENS tokens."""

    words: int = 900
    prompt_tokens: int = 0

    def calibrate(self, target: Target) -> None:
        """Fit `words` to PROMPT_TOKENS by this server's token count. The requests are not measured."""
        for _ in range(2):
            self.prompt_tokens = self._count(target)
            self.words = round(self.words * PROMPT_TOKENS / self.prompt_tokens)
        self.prompt_tokens = self._count(target)

    def _count(self, target: Target) -> int:
        body = chat(long_text(self.words, seed=-1), 1)
        body.pop("stream_options")  # only allowed with `stream`
        return count_prompt(target.port, body)

    def steps(self, seed: int) -> tuple[Callable[[Target], dict[str, float]], ...]:
        """Return the measurements of one round, each a function of the server. `seed` makes the prompts unique."""

        def decode_one(target: Target) -> dict[str, float]:
            answer = stream(target.port, chat(f"{STORY} Begin with the number {seed}.", DECODE_TOKENS))
            if answer.tokens < DECODE_TOKENS // 2:
                raise RequestFailed(f"the answer has only {answer.tokens} tokens: too few to measure")
            return {"decode_1_tok_s": answer.decode_rate}

        def decode_many(target: Target) -> dict[str, float]:
            bodies = [chat(f"{STORY} Give it {k + 2} chapters.", CLIENT_TOKENS) for k in range(CLIENTS)]
            answers = stream_many(target.port, bodies)
            seconds = max(a.begun + a.end for a in answers) - min(a.begun for a in answers)
            return {f"decode_{CLIENTS}_tok_s": sum(answer.tokens for answer in answers) / seconds}

        def prompt(target: Target) -> dict[str, float]:
            body = chat(long_text(self.words, seed), 4)
            return {"ttft_cold_s": stream(target.port, body).first, "ttft_cached_s": stream(target.port, body).first}

        def extract(target: Target) -> dict[str, float]:
            question = f"Give the invoice's data as JSON.\n\n{INVOICE}\nReference {seed}."
            shape = target.contender.response_format(INVOICE_SCHEMA)
            answer = stream(target.port, chat(question, EXTRACT_TOKENS, response_format=shape))
            return {
                "extract_s": answer.end,
                "extract_tokens": answer.tokens,
                "extract_valid": float(_is_json(answer.text) and answer.finish == "stop"),
            }

        return decode_one, decode_many, prompt, extract, self.constrained

    def constrained(self, target: Target) -> dict[str, float]:
        """Return the milliseconds per token without a schema and with two schemas, for the same cached prompt.

        The time of the whole request is divided by its tokens. It includes no prefill, because the prompt is cached,
        but it includes what a grammar costs before the first token.
        """
        stream(target.port, chat(STORY, 1))
        metrics: dict[str, float] = {}
        for name, schema in (("text", None), ("free_text", FREE_TEXT_SCHEMA), ("structure", STRUCTURE_SCHEMA)):
            fields = {} if schema is None else {"response_format": target.contender.response_format(schema)}
            answer = stream(target.port, chat(STORY, CONSTRAINED_TOKENS, **fields))
            if answer.tokens < CONSTRAINED_TOKENS * 2 // 3:
                raise RequestFailed(f"the {name} answer has only {answer.tokens} tokens: too few to measure")
            metrics[f"{name}_ms_tok"] = answer.end / answer.tokens * 1e3
        metrics["constrained_free_text_x"] = metrics["free_text_ms_tok"] / metrics["text_ms_tok"]
        metrics["constrained_structure_x"] = metrics["structure_ms_tok"] / metrics["text_ms_tok"]
        return metrics


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
