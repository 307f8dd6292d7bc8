"""Compare speed and memory on one GPU with other trainers: `make bench-gpu`, or `benchmarks/gpu.py --budget 9 --part lora`.

Models have real shapes and random weights, and rows are synthetic, so that nothing is downloaded. The parts run in order of worth.
Each contestant runs in its own processes with a time limit. Each result is written to benchmarks/results/gpu.json at once, so the
next call continues where `--budget` or a lost machine ended the last one. A call then generates the table in docs/performance.md and
the README's status from that file; `--pages` does only this, without a GPU.

`--tiny` uses shapes that two CPU cores train in seconds, and `--simulate` runs part `step` on a simulated GPU, which needs Triton.
Both only test the script and the installation, and their figures never reach a page.
"""

import argparse
import heapq
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.gpu_pages import table, write_pages
from benchmarks.gpu_parts import CONTESTANTS, PARTS
from benchmarks.gpu_processes import ContestantFailedError, DeadlineError, kill_left
from benchmarks.gpu_results import Origin, Results, ResultsError, Round, locked, origin_of
from benchmarks.gpu_runs import ON_CPU, ON_GPU, SIMULATED, Bench, Measured, Setting
from benchmarks.report import RESULTS, find_gpu

_CORES_OF_A_CONTESTANT = 2
# The last three come from reading what a run wrote: no fault of one contestant may cost the figures of the others.
_FAILURES = (ContestantFailedError, KeyError, OSError, ValueError)


@dataclass
class Outcome:
    """The contestants of a call."""

    measured: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    """Contestants that the budget left to the next call -> estimated seconds."""


def main() -> None:
    arguments = _parse_arguments()
    try:
        if arguments.pages:
            write_pages()
        else:
            _run(arguments)
    except ResultsError as error:
        raise SystemExit(f"error: {error}") from error


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        metavar="PART",
        help=f"part to run, may be repeated; default: all, in this order: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--budget", type=_minutes, default=math.inf, metavar="MINUTES", help="time for all parts"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIRECTORY",
        help="output directory; default: benchmarks/results, with --tiny or --simulate a temporary directory",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tiny", action="store_true", help="use shapes for two CPU cores")
    mode.add_argument(
        "--simulate", action="store_true", help="run part `step` on a simulated GPU; needs Triton"
    )
    mode.add_argument(
        "--pages", action="store_true", help="only generate the pages from benchmarks/results; needs no GPU"
    )
    arguments = parser.parse_args()
    if arguments.simulate and arguments.part not in (None, ["step"]):
        parser.error("--simulate runs part step only: remove --part, or use --tiny")
    if arguments.simulate and find_spec("triton") is None:
        parser.error(
            "--simulate needs Triton, which cannot be imported: run `make setup-dev` and set PYTHONPATH=.venv/interpreter"
        )
    is_test = arguments.tiny or arguments.simulate
    if is_test and arguments.results and arguments.results.resolve() == RESULTS.resolve():
        parser.error(
            "--results benchmarks/results is for figures of a GPU: choose another directory with --tiny or --simulate"
        )
    return arguments


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of minutes")
    return minutes


def _run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and generate the pages if the results are those of the project."""
    deadline = time.monotonic() + 60 * arguments.budget
    setting = SIMULATED if arguments.simulate else ON_CPU if arguments.tiny else ON_GPU
    gpu, reason = find_gpu() if setting is ON_GPU else (None, "")
    if setting is ON_GPU and gpu is None:
        raise SystemExit(f"no GPU: {reason}. --tiny runs the same script with shapes for two CPU cores")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    directory = Path(tempfile.gettempdir()) / f"anneal-bench-{'gpu' if setting is ON_GPU else setting.shapes}"
    output = arguments.results or (RESULTS if setting is ON_GPU else directory / "results")
    with ExitStack() as locks:
        locks.enter_context(locked(directory, "TMPDIR"))
        locks.enter_context(locked(output, "--results"))
        results = Results(output)
        if killed := kill_left(directory):
            print(f"killed {killed} processes of an earlier call")
        bench = Bench(setting, directory, output / "gpu_logs")
        parts = arguments.part or (["step"] if arguments.simulate else list(PARTS))
        outcome = measure(bench, parts, deadline, results, origin_of(setting.shapes, gpu))
        if setting is ON_GPU and output.resolve() == RESULTS.resolve():
            write_pages()
    if results.latest(setting.shapes):
        print(table(results, setting.shapes))
    if outcome.failed:
        raise SystemExit(f"failed: {', '.join(outcome.failed)}")
    if outcome.left and not outcome.measured:
        seconds = min(outcome.left.values())
        shortest = ", ".join(name for name, needed in outcome.left.items() if needed == seconds)
        raise SystemExit(f"nothing was measured: {shortest} needs about {seconds:g} s; raise --budget")


def _stop(number: int, _: object) -> None:
    """Exit; the contestants' processes are killed before."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    os.write(2, b"stopped: rerun the same command to continue\n")  # print could be interrupted by itself
    raise SystemExit(128 + number)


def measure(bench: Bench, parts: Sequence[str], deadline: float, results: Results, origin: Origin) -> Outcome:
    """Run the contestants of these parts that the current round lacks, and write each result at once.

    A contestant that does not fit into the remaining time is left to the next call, and a shorter one may still run. Those that
    failed in an earlier call run after all others.

    Args:
        bench: Runner of the contestants.
        parts: Names in PARTS, in order.
        deadline: Deadline by `time.monotonic()`.
        results: The results of earlier calls.
        origin: The conditions of this call.

    Returns:
        The contestants; errors of the failed ones are printed. The next call retries them.
    """
    selected = [name for name in _contestants(parts) if _can_run(name, bench.setting)]
    round_, outcome = results.current_round(origin, selected), Outcome()
    measured, before = set(round_.measured), set(round_.failed)
    timed = [part for part in parts if PARTS[part].timed]
    ahead = [part for part in timed if not measured.issuperset(PARTS[part].contestants)]
    shapes = dict.fromkeys(bench.workloads[PARTS[part].workload].shape for part in ahead)
    for retries in (False, True):
        for group in _groups(parts):
            names = [name for name in group if name in selected and name not in measured]
            names = [name for name in names if (name in before) == retries]
            names = [
                name for name in names if name not in (*outcome.measured, *outcome.failed, *outcome.left)
            ]
            if names:
                meanwhile = [] if group[0] in _contestants(timed) else list(shapes)
                _run_group(bench, names, deadline, (results, round_), outcome, meanwhile)
    return outcome


def _contestants(parts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in PARTS[part].contestants))


def _can_run(name: str, setting: Setting) -> bool:
    return setting.device == "cuda" or not CONTESTANTS[name].needs_gpu


def _groups(parts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the contestants that run at the same time, the longest first."""
    started = set()
    for part in parts:
        together = PARTS[part].together
        if together is None:
            yield from ([name] for name in PARTS[part].contestants)
        elif together not in started:
            started.add(together)
            names = _contestants([other for other in parts if PARTS[other].together == together])
            yield sorted(names, key=lambda name: -CONTESTANTS[name].seconds)


def estimated_seconds(names: Sequence[str], cores: int) -> float:
    """Return the estimated seconds of contestants that start in this order on a machine with a GPU and these cores."""
    ends = [0.0] * _slots(cores)
    for name in names:
        heapq.heapreplace(ends, ends[0] + CONTESTANTS[name].seconds)
    return max(ends)


def _slots(cores: int) -> int:
    return max(1, cores // _CORES_OF_A_CONTESTANT)


def _run_group(
    bench: Bench,
    names: Sequence[str],
    deadline: float,
    target: tuple[Results, Round],
    outcome: Outcome,
    meanwhile: Sequence[str],
) -> None:
    """Run these contestants at the same time, and add them to the outcome; make the models of these shapes meanwhile."""
    cores = os.cpu_count() or 1
    seconds = estimated_seconds(names, cores)
    if time.monotonic() + seconds > deadline:
        them = "it" if len(names) == 1 else "them"
        print(
            f"no time is left for {', '.join(names)} (about {seconds:g} s): rerun the same command to measure {them}"
        )
        outcome.left |= dict.fromkeys(names, seconds)
        return
    with ThreadPoolExecutor(_slots(cores) + bool(meanwhile)) as pool:
        if meanwhile:
            # An error is not lost: the first contestant that needs the model makes it again.
            pool.submit(_make_models, bench, meanwhile, deadline)
        runs = {pool.submit(_timed, bench, name, deadline): name for name in names}
        try:
            for run in as_completed(runs):
                _add(runs[run], run, deadline, target, outcome)
        except BaseException:
            bench.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_models(bench: Bench, shapes: Sequence[str], deadline: float) -> None:
    bench.set_deadline(deadline)
    for shape in shapes:
        bench.model(shape)


def _add(
    name: str, run: Future[Measured], deadline: float, target: tuple[Results, Round], outcome: Outcome
) -> None:
    """Add the result of a contestant, or its error; one that the end of the budget stopped has neither."""
    results, round_ = target
    try:
        measured = run.result()
    except _FAILURES as error:
        if isinstance(error, DeadlineError) and time.monotonic() > deadline:
            print(
                f"{name} was stopped at the end of the budget: rerun the same command to measure it",
                flush=True,
            )
            outcome.left[name] = CONTESTANTS[name].seconds
            return
        text = str(error) if isinstance(error, ContestantFailedError) else repr(error)
        results.add_failure(round_, name, text)
        print(f"{name} failed: {text}", file=sys.stderr, flush=True)
        outcome.failed.append(name)
        return
    results.add(round_, name, measured)
    print(f"{name}: {measured.seconds:.0f} s", flush=True)
    outcome.measured.append(name)


def _timed(bench: Bench, name: str, deadline: float) -> Measured:
    start, estimate = time.monotonic(), CONTESTANTS[name].seconds
    print(f"{name}: started{f', about {estimate:g} s' if bench.setting is ON_GPU else ''}", flush=True)
    bench.set_deadline(min(deadline, start + bench.setting.time_limit * estimate))
    measured = CONTESTANTS[name].run(bench)
    return replace(measured, seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()
