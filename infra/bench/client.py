"""Send chat requests over HTTP and time them at the socket.

The client shares a few cores with the servers it measures. While an answer streams, it only records the time and bytes
of each read, and it parses them afterwards. It does not use the `openai` client, because parsing events with it costs
more per token than a small model's decode step leaves free.
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
    """A server rejected a request, or did not complete its answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are in seconds since the request began, including the connect."""

    text: str
    first: float  # when the first delta with content arrived
    last: float  # when the last one arrived
    end: float  # when the stream ended
    begun: float  # on time.monotonic()'s clock
    deltas: int
    tokens: int
    finish: str | None
    cached_tokens: int | None  # None: the server does not report it

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first delta. Correct only if each delta is one token (plain text, no schema)."""
        return (self.tokens - 1) / (self.last - self.first)


def stream(port: int, body: Mapping[str, Any]) -> Answer:
    """POST `body` to /v1/chat/completions as a stream and read it to its end.

    `tokens` comes from the server's `usage`. Without one it is `max_tokens` if that ended the answer, else the number
    of deltas: servers without usage send one delta per token. Raises RequestFailed or OSError.
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
    """Return the answer in the timed reads of an event stream. A read may end anywhere in an event.

    Raises RequestFailed for an error event or an answer without content.
    """
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
    """Call `stream` for all bodies at once, each in its own thread. Raises the first failure when all have ended."""
    answers: list[Answer | None] = [None] * len(bodies)
    failures: list[Exception] = []
    barrier = threading.Barrier(len(bodies))

    def run(index: int) -> None:
        barrier.wait()
        try:
            answers[index] = stream(port, bodies[index])
        except (RequestFailed, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [answer for answer in answers if answer is not None]


def count_prompt(port: int, body: Mapping[str, Any]) -> int:
    """Return the prompt tokens of `body`, from the usage of a non-streaming answer of one token."""
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
