"""The mirror's protocol, explored exhaustively: no interleaving, crash or lost answer leads to a wrong model.

A process reads manifest and blob, takes the lock, reads both again, completes the blob if it is missing, replaces the
manifest that it read, and releases the lock. Each step below is one request to S3.
"""

from collections import deque
from typing import NamedTuple

import pytest


class Process(NamedTuple):
    at: str = "look"
    lock: int = 0  # version of the lock that the process wrote
    manifest: int = 0  # version of the manifest that it read
    etag: int = 0  # ETag of the blob that it read or wrote


class State(NamedTuple):
    lock: int  # version, 0: none
    expired: bool
    blob: int  # ETag, 0: none
    manifest: tuple[int, int]  # (version, ETag of its blob), (0, 0): none
    processes: tuple[Process, ...]
    expiries: int
    crashes: int
    losses: int  # how many answers may still be lost after a write
    removals: int  # how often a lifecycle rule or a person may still delete the blob
    fresh: int = 1  # the next version


def is_whole(state: State) -> bool:
    return state.blob != 0 and state.manifest[1] == state.blob


def successors(state: State):
    """Yield every state that one step leads to."""
    if state.lock and not state.expired and state.expiries:
        yield state._replace(expired=True, expiries=state.expiries - 1)
    if state.blob and state.removals:
        yield state._replace(blob=0, removals=state.removals - 1)
    for index, process in enumerate(state.processes):
        if process.at in ("done", "dead"):
            continue
        others = state.processes[:index] + state.processes[index + 1 :]
        if state.crashes:
            yield state._replace(processes=(*others, Process("dead")), crashes=state.crashes - 1)
        for after, change in steps(state, process):
            yield state._replace(processes=(*others, after), **change)


def steps(state: State, process: Process):  # noqa: C901 - one case for each request
    """Yield (the process afterwards, the changes in S3) for each outcome of its next request."""
    fresh = {"fresh": state.fresh + 1}
    lost = {"losses": state.losses - 1} if state.losses else None
    match process.at:
        case "look":
            yield Process("done" if is_whole(state) else "acquire"), {}
        case "acquire" if (
            not state.lock or state.expired
        ):  # after a lost answer it reads its own lock, so the outcome is the same
            yield Process("read manifest", lock=state.fresh), {"lock": state.fresh, "expired": False, **fresh}
        case "read manifest":
            yield process._replace(at="read blob", manifest=state.manifest[0]), {}
        case "read blob":
            seen = process._replace(etag=state.blob, at="put manifest" if state.blob else "renew")
            yield (process._replace(at="release") if is_whole(state) else seen), {}
        case "renew":
            if state.lock == process.lock:
                after = process._replace(at="complete", lock=state.fresh)
                yield after, {"lock": state.fresh, "expired": False, **fresh}
            else:
                yield Process("look"), {}
        case "complete":  # only if there is no blob; after a lost answer it finds the blob and continues
            etag = state.blob or state.fresh
            yield process._replace(at="put manifest", etag=etag), {"blob": etag, **fresh}
        case "put manifest":
            if state.manifest[0] == process.manifest:
                written = {"manifest": (state.fresh, process.etag), **fresh}
                yield process._replace(at="release"), written
                if lost:
                    yield process._replace(at="release lost"), {**written, **lost}
            else:
                yield process._replace(at="release lost"), {}
        case "release" | "release lost":
            after = Process("done" if process.at == "release" else "look")
            yield after, {"lock": 0, "expired": False} if state.lock == process.lock else {}


def canonical(state: State) -> tuple:
    """Return an equivalent key: only equality of versions matters, and processes are interchangeable."""
    names = {0: 0}

    def name(version):
        return names.setdefault(version, len(names))

    lock, blob = name(state.lock), name(state.blob)
    manifest = tuple(map(name, state.manifest))
    processes = [(each.at, name(each.lock), name(each.manifest), name(each.etag)) for each in sorted(state.processes)]
    return (lock, state.expired, blob, manifest, tuple(processes), *state[5:9])


def heals(state: State) -> bool:
    """Whether one more process, after the lock has expired, completes the mirror."""
    state = state._replace(processes=(Process(),), expired=True, expiries=0, crashes=0, losses=0, removals=0)
    while state.processes[0].at != "done":
        state = next(successors(state))
    return is_whole(state)


@pytest.mark.parametrize(
    ("uploaders", "expiries", "crashes", "losses", "removals"), [(3, 2, 2, 1, 0), (2, 2, 1, 1, 1), (3, 1, 1, 0, 1)]
)
def test_every_interleaving_leaves_a_valid_mirror(uploaders, expiries, crashes, losses, removals):
    """A finished process leaves a manifest of the blob. From any end state, one more process completes the mirror."""
    first = State(0, False, 0, (0, 0), (Process(),) * uploaders, expiries, crashes, losses, removals)
    seen, queue, ends = {canonical(first)}, deque([first]), 0
    while queue:
        state = queue.popleft()
        following = list(successors(state))
        for after in following:
            assert removals or not state.blob or after.blob == state.blob, "a blob was written twice"
            if (key := canonical(after)) not in seen:
                seen.add(key)
                queue.append(after)
        if all(each.at in ("done", "dead") for each in state.processes):
            ends += 1
            if not removals and any(each.at == "done" for each in state.processes):
                assert is_whole(state), state
            assert heals(state), state
        else:
            locked = state.lock and not state.expired
            assert following or locked, "no process can continue"
    assert ends > 10
    assert len(seen) > 1000
