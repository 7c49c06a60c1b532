"""Compare this server with a baseline server, `python -m llama_cpp.server`, over HTTP and with the same model.

Each round starts every server and then runs each measurement on one server after the other. The order rotates, so that
other load on the machine affects all of them, and ratios are computed within a round. Standard output has one JSON line
per server and per comparison; standard error has a table. A round takes about 40 s on 2 idle cores and much longer on
busy ones, because the compute threads synchronize several hundred times per token. A round starts only if it can finish
within --seconds, and is aborted if it does not.

Measured are: the time from process start to the first token; decode tokens/s for one client (after its first token)
and for four clients (all tokens over the total time, prefill included); the time to the first token of a 1,000-token
prompt, new and repeated; the time of one extraction with a schema; the time per token with and without a schema
(same cached prompt); and peak resident memory (VmHWM). The raw llama.cpp loop
(`infra.bench.floor`) shows the limit of the machine.
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
    """The time limit of --seconds was reached."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all servers were measured, whether they met the targets or not, else 1."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that `with` blocks stop the servers
    load = load_from(options)
    try:
        contenders = _contenders(options, load)
        measured = run(contenders, load, options.rounds, options.seconds, with_floor=options.floor)
    except (StartFailed, RequestFailed, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"The benchmark failed: {error}", file=sys.stderr)
        return 1
    if not all(measured.values()):
        print("Nothing was measured, because no round finished. Increase --seconds.", file=sys.stderr)
        return 1
    _report(contenders, load, measured)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=("ours", "baseline", "baseline-defaults"),
        default=["ours", "baseline"],
        help=f"servers to measure (default: ours baseline); baseline is {PEER} with our settings, or with its defaults",
    )
    parser.add_argument("--llama-server", type=Path, metavar="BINARY", help="also measure llama.cpp's C++ server")
    parser.add_argument("--rounds", type=int, default=5, help="maximum number of rounds (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=270, help="time limit for all rounds (default %(default)s)")
    parser.add_argument("--no-floor", dest="floor", action="store_false", help="do not measure the raw llama.cpp loop")
    return parser.parse_args(argv)


def _contenders(options: argparse.Namespace, load: Load) -> list[Contender]:
    names = dict.fromkeys(options.servers)
    contenders: list[Contender] = [
        Ours(load) if name == "ours" else LlamaCppServer(load, peer_python(), tuned=name == "baseline")
        for name in names
    ]
    if options.llama_server is not None:
        check_llama_server(options.llama_server)
        contenders.append(LlamaServer(load, options.llama_server.resolve()))
    return contenders


def run(
    contenders: Sequence[Contender], load: Load, rounds: int, seconds: float, *, with_floor: bool
) -> dict[str, list[dict[str, float]]]:
    """Return the rounds by server name, and by FLOOR. Raise StartFailed or RequestFailed."""
    workload = Workload()
    measured: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    if with_floor:
        measured[FLOOR] = []
    begun, longest = time.monotonic(), 0.0
    for number in range(rounds):
        round_begun = time.monotonic()
        if number and round_begun - begun + longest > seconds:
            print(f"Stopped after {number} rounds: another would exceed {seconds:g} s.", file=sys.stderr)
            break
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        turn = number % len(contenders)
        try:
            with _at_most(begun + seconds - round_begun):
                values = one_round([*contenders[turn:], *contenders[:turn]], workload, number)
                if with_floor:
                    values[FLOOR] = _floor(load)
        except OutOfTime:
            print(f"Round {number + 1} was aborted after {seconds:g} s in total. Is the machine busy?", file=sys.stderr)
            break
        for name, metrics in values.items():
            measured[name].append(metrics)
        longest = max(longest, time.monotonic() - round_begun)
    return measured


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it takes longer."""

    def over(number: int, frame: object) -> NoReturn:
        raise OutOfTime

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def one_round(order: Sequence[Contender], workload: Workload, number: int) -> dict[str, dict[str, float]]:
    """Start all servers, run each measurement on one after the other, stop them."""
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
    """Run the raw loop in its own process, so that its memory and threads are gone when servers are measured."""
    command = [sys.executable, "-m", "infra.bench.floor", "--model", str(load.model), "--n-ctx", str(load.n_ctx)]
    command += ["--n-batch", str(load.n_batch), "--n-threads", str(load.n_threads)]
    process = subprocess.run(command, cwd=ROOT, env=environment({}), stdout=subprocess.PIPE, check=True, timeout=120)
    return {name: float(value) for name, value in json.loads(process.stdout).items()}


def _report(contenders: Sequence[Contender], load: Load, measured: dict[str, list[dict[str, float]]]) -> None:
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
