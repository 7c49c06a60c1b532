"""Server: ours beside `python -m llama_cpp.server` over HTTP, on one model, in one run.

Every round starts each server anew, then puts the same work to one after the other (the order turns from round to
round), so that whatever else the machine does falls on all of them; ratios are formed within a round. Standard output
gets one JSON line per server and one per comparison, standard error a table. A round takes about 40 s on 2 idle cores,
many times that on busy ones: two compute threads wait for each other some hundred times a token. No round begins that
would not end within --seconds, and one that runs over is given up.

Measured: process start to first token over HTTP; decode tokens/s for one client (after its first token) and for four
(all their tokens over the whole time, prompts included); time to first token of a 1,000-token prompt, new and
repeated; seconds for one schema-bound extraction; milliseconds a token with a schema against without (same prompt,
cached); the peak of resident memory (VmHWM). The floor is llama.cpp's decode loop alone (`infra.bench.floor`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from infra.bench import report
from infra.bench.client import RequestFailed
from infra.bench.contender import OURS, ROOT, Contender, Load, Ours
from infra.bench.model import add_arguments, load_from
from infra.bench.peer import PEER, LlamaCppServer, LlamaServer, check_llama_server, peer_python
from infra.bench.process import Process, StartFailed, environment
from infra.bench.workload import FIRST, Target, Workload

FLOOR = "floor"


class OutOfTime(Exception):
    """--seconds are over."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when everything was measured (goals missed or not), 1 when a server could not be."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks end the servers
    load = load_from(options)
    try:
        contenders = _contenders(options, load)
        measured = run(contenders, load, options.rounds, options.seconds, with_floor=options.floor)
    except (StartFailed, RequestFailed, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"benchmark stopped: {error}", file=sys.stderr)
        return 1
    if not all(measured.values()):
        print("nothing was measured: no round came to its end", file=sys.stderr)
        return 1
    _tell(contenders, load, measured)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=("ours", "peer", "peer-defaults"),
        default=["ours", "peer"],
        help=f"which to measure (default: ours peer); peer is {PEER}, peer-defaults the same without our settings",
    )
    parser.add_argument("--llama-server", type=Path, metavar="BINARY", help="measure llama.cpp's C++ server too")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at most (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=270, help="time for all rounds (default %(default)s)")
    parser.add_argument("--no-floor", dest="floor", action="store_false", help="leave out the bare decode loop")
    return parser.parse_args(argv)


def _contenders(options: argparse.Namespace, load: Load) -> list[Contender]:
    names = dict.fromkeys(options.servers)
    contenders: list[Contender] = [
        Ours(load) if name == "ours" else LlamaCppServer(load, peer_python(), tuned=name == "peer") for name in names
    ]
    if options.llama_server is not None:
        check_llama_server(options.llama_server)
        contenders.append(LlamaServer(load, options.llama_server.resolve()))
    return contenders


def run(
    contenders: Sequence[Contender], load: Load, rounds: int, seconds: float, *, with_floor: bool
) -> dict[str, list[dict[str, float]]]:
    """Measured rounds by server name (and FLOOR). Raises StartFailed, RequestFailed."""
    workload = Workload()
    measured: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    if with_floor:
        measured[FLOOR] = []
    begun, longest = time.monotonic(), 0.0
    for number in range(rounds):
        round_begun = time.monotonic()
        if number and round_begun - begun + longest > seconds:
            print(f"stopped after {number} rounds: no time for another within {seconds:g} s", file=sys.stderr)
            break
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        turn = number % len(contenders)
        try:
            with _at_most(begun + seconds - round_begun):
                values = one_round([*contenders[turn:], *contenders[:turn]], workload, number)
                if with_floor:
                    values[FLOOR] = _floor(load)
        except OutOfTime:
            print(f"round {number + 1} was given up: {seconds:g} s are over; is the machine busy?", file=sys.stderr)
            break
        for name, one in values.items():
            measured[name].append(one)
        longest = max(longest, time.monotonic() - round_begun)
    return measured


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it runs longer."""

    def over(number: int, frame: object) -> NoReturn:
        raise OutOfTime

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def one_round(order: Sequence[Contender], workload: Workload, number: int) -> dict[str, dict[str, float]]:
    """Start each server, put every measurement to one after the other, end them."""
    values: dict[str, dict[str, float]] = {contender.name: {} for contender in order}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(contender)) for contender in order]
        for process in processes:
            values[process.contender.name]["start_s"], _ = process.start(FIRST)
        targets = [Target(process.port, process.contender) for process in processes]
        if not workload.prompt_tokens:
            workload.calibrate(targets[0])
        for step in workload.steps(seed=number + 1):
            for target in targets:
                try:
                    values[target.contender.name] |= step(target)
                except (RequestFailed, OSError) as error:
                    raise RequestFailed(f"{target.contender.name}, {step.__name__}: {error}") from error
        for process in processes:
            values[process.contender.name]["peak_memory_mib"] = process.peak_memory_mib()
    return values


def _floor(load: Load) -> dict[str, float]:
    """The floor in a process of its own: its memory and threads must not stay beside the servers."""
    command = [sys.executable, "-m", "infra.bench.floor", "--model", str(load.model), "--n-ctx", str(load.n_ctx)]
    command += ["--n-batch", str(load.n_batch), "--n-threads", str(load.n_threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment({}), stdout=subprocess.PIPE, check=True, timeout=120)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def _tell(contenders: Sequence[Contender], load: Load, measured: dict[str, list[dict[str, float]]]) -> None:
    machine = {"cpu": _cpu_name(), "cpus": load.n_threads, "python": platform.python_version()}
    summaries = {name: report.summary(rounds) for name, rounds in measured.items()}
    for name, rounds in measured.items():
        report.line(
            {
                "server": name,
                "model": load.model.name,
                "n_ctx": load.n_ctx,
                "n_batch": load.n_batch,
                "n_threads": load.n_threads,
                "rounds": len(rounds),
                **machine,
                **summaries[name],
            }
        )
    first = contenders[0].name
    compared: dict[str, dict[str, dict[str, float]]] = {}
    for name, rounds in measured.items():
        if name != first:
            compared[f"/ {name}"] = report.ratios(measured[first], rounds)
            goals = report.RATIO_GOALS if (first, name) == (OURS, PEER) else {}
            report.line({"ratio": f"{first} / {name}", **compared[f"/ {name}"], **_goals(compared[f"/ {name}"], goals)})
    if first == OURS:
        report.line({"ratio": f"{first}, constrained / unconstrained", **_goals(summaries[first], report.OWN_GOALS)})
    print("\n" + report.table("median (min-max)", summaries), file=sys.stderr)
    if compared:
        print("\n" + report.table(first, compared), file=sys.stderr)


def _goals(numbers: dict[str, dict[str, float]], goals: dict[str, report.Goal]) -> dict[str, Any]:
    return {"goals": report.judged(numbers, goals)} if goals else {}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
