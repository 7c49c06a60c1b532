"""Client: chat requests over HTTP, timed at the socket.

It shares the machine's few cores with the servers it measures, so it does next to nothing while an answer streams: it
keeps (time, bytes) of each read and parses them when the answer is over. No HTTP library, no `openai` client, whose
event parsing costs more per token than a small model's decode step leaves free.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 120.0


class RequestFailed(RuntimeError):
    """A server refused, or broke off, a request that it should have answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are seconds since the request began (connecting included)."""

    text: str
    first: float  # the first delta with content
    last: float  # the last one
    end: float  # the stream's end
    begun: float  # on time.monotonic()'s clock
    deltas: int
    tokens: int
    finish: str | None
    cached_tokens: int | None  # None: the server does not say

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first delta; right where each delta is one token (no constraint, plain text)."""
        return (self.tokens - 1) / (self.last - self.first)


def stream(port: int, body: Mapping[str, Any]) -> Answer:
    """POST `body` to /v1/chat/completions as a stream and read it to its end.

    Tokens are the server's `usage` if it sends one, else `max_tokens` if that ended the answer, else the number of
    deltas (the servers without usage send one delta a token). Raises RequestFailed, OSError.
    """
    payload = json.dumps({**body, "stream": True})
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    reads: list[tuple[float, bytes]] = []
    try:
        connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        while chunk := response.read1():
            reads.append((time.monotonic() - begun, chunk))
    except http.client.HTTPException as error:
        raise RequestFailed(f"the stream broke off: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise RequestFailed(f"status {response.status}: {b''.join(chunk for _, chunk in reads)[:500]!r}")
    return parsed(reads, begun, int(body.get("max_tokens", 0)))


def parsed(reads: Sequence[tuple[float, bytes]], begun: float, max_tokens: int) -> Answer:
    """The answer in timed reads of an event stream, cut anywhere. Raises RequestFailed: an error event, no content."""
    text: list[str] = []
    times: list[float] = []
    finish: str | None = None
    usage: dict[str, Any] = {}
    rest = b""
    for at, chunk in reads:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RequestFailed(f"error in the stream: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish = choice.get("finish_reason") or finish
                if content := choice["delta"].get("content"):
                    text.append(content)
                    times.append(at)
    if not times:
        raise RequestFailed("the answer has no content")
    tokens = usage.get("completion_tokens") or (max_tokens if finish == "length" else len(times))
    return Answer(
        text="".join(text),
        first=times[0],
        last=times[-1],
        end=reads[-1][0],
        begun=begun,
        deltas=len(times),
        tokens=tokens,
        finish=finish,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )


def stream_many(port: int, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """`stream` all bodies at once, a thread each. Raises the first failure after all threads have ended."""
    answers: list[Answer | None] = [None] * len(bodies)
    failures: list[Exception] = []
    barrier = threading.Barrier(len(bodies))

    def one(index: int) -> None:
        barrier.wait()
        try:
            answers[index] = stream(port, bodies[index])
        except (RequestFailed, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [answer for answer in answers if answer is not None]


def count_prompt(port: int, body: Mapping[str, Any]) -> int:
    """Prompt tokens of `body`, from the usage of an unstreamed answer of one token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        payload = json.dumps({**body, "max_tokens": 1})
        connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RequestFailed(f"status {response.status}: {content[:500]!r}")
    return int(json.loads(content)["usage"]["prompt_tokens"])
