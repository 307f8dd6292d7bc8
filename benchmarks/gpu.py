"""Compare speed and memory on one GPU with other trainers: `make bench-gpu`, or `benchmarks/gpu.py --budget 9 --part lora`.

Models have real shapes and random weights, and rows are synthetic, so that nothing is downloaded. The parts run in order of worth.
Each contestant runs in its own processes with a time limit. Each result is written to benchmarks/results/gpu.json at once, so the
next call continues where `--budget` or a lost machine ended the last one, and then generates the table in docs/performance.md.

`--tiny` uses shapes that two CPU cores train in seconds, and `--simulate` runs part `step` on a simulated GPU. Both only test the
script and the installation.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.gpu_parts import CONTESTANTS, PARTS
from benchmarks.gpu_processes import ContestantFailedError
from benchmarks.gpu_results import Results, write_pages
from benchmarks.gpu_runs import ON_CPU, ON_GPU, SIMULATED, Bench, Measured, Setting
from benchmarks.report import RESULTS, gpu_name

_CORES_OF_A_CONTESTANT = 2
# The last three come from reading what a run wrote: no fault of one contestant may cost the figures of the others.
_FAILURES = (ContestantFailedError, KeyError, OSError, ValueError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help="part to run, may be repeated; default: all, in this order",
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="MINUTES", help="time for all parts"
    )
    parser.add_argument("--tiny", action="store_true", help="use shapes for two CPU cores")
    parser.add_argument("--simulate", action="store_true", help="run part `step` on a simulated GPU")
    parser.add_argument(
        "--results",
        type=Path,
        help="output directory; default: benchmarks/results, with --tiny or --simulate a temporary directory",
    )
    arguments = parser.parse_args()
    # A contestant's processes are stopped before this one exits.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deadline = time.monotonic() + 60 * arguments.budget
    setting = SIMULATED if arguments.simulate else ON_CPU if arguments.tiny else ON_GPU
    if setting is ON_GPU and shutil.which("nvidia-smi") is None:
        raise SystemExit("this machine has no GPU: --tiny runs the same script with shapes for two CPU cores")
    kind = "simulated" if arguments.simulate else "tiny" if arguments.tiny else "gpu"
    directory = Path(tempfile.gettempdir()) / f"anneal-bench-{kind}"
    directory.mkdir(exist_ok=True)
    results = Results(arguments.results or (RESULTS if setting is ON_GPU else directory / "results"))
    bench = Bench(setting, directory, results.directory / "gpu_logs")
    parts = arguments.part or (["step"] if arguments.simulate else list(PARTS))
    failed = measure(bench, parts, deadline, results)
    if results.directory.resolve() == RESULTS:
        write_pages(results)
    print(results.table())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measure(bench: Bench, parts: Sequence[str], deadline: float, results: Results) -> list[str]:
    """Run the contestants of these parts that the current round lacks, and write each result at once.

    A contestant that does not fit into the remaining time is left to the next call, and a shorter one may still run. Those that
    failed in an earlier call run after all others.

    Args:
        bench: Runner of the contestants.
        parts: Names in PARTS, in order.
        deadline: Deadline by `time.monotonic()`.
        results: The results of earlier calls.

    Returns:
        The contestants that failed; their errors are printed. The next call retries them.
    """
    needed = dict.fromkeys(name for part in parts for name in PARTS[part].contestants)
    selected = [name for name in needed if _can_run(name, bench.setting)]
    measured = results.current_round(gpu_name(), selected).measured
    before, failed = set(results.failed), []
    for retries in (False, True):
        for group in _groups(parts):
            names = [name for name in group if name in selected and name not in measured]
            names = [name for name in names if (name in before) == retries and name not in failed]
            if names:
                failed += _run_group(bench, names, deadline, results)
    return failed


def _can_run(name: str, setting: Setting) -> bool:
    return setting.device == "cuda" or not CONTESTANTS[name].needs_gpu


def _groups(parts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the contestants that run at the same time."""
    for part in parts:
        names = PARTS[part].contestants
        yield from [names] if PARTS[part].at_once else [[name] for name in names]


def _run_group(bench: Bench, names: Sequence[str], deadline: float, results: Results) -> list[str]:
    """Run these contestants at the same time; return those that failed."""
    failed = []
    seconds = max(CONTESTANTS[name].seconds for name in names)
    if time.monotonic() + seconds > deadline:
        print(f"no time is left for {', '.join(names)} (about {seconds:g} s); the same command continues")
        return failed
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // _CORES_OF_A_CONTESTANT)) as pool:
        runs = {pool.submit(_timed, bench, name, deadline): name for name in names}
        try:
            for run in as_completed(runs):
                failed += _add(runs[run], run, results)
        except BaseException:
            bench.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _add(name: str, run: Future[Measured], results: Results) -> list[str]:
    """Add the result of a contestant, or its error; return its name if it failed."""
    try:
        measured = run.result()
    except _FAILURES as error:
        text = str(error) if isinstance(error, ContestantFailedError) else repr(error)
        results.add_failure(name, text)
        print(f"{name} failed: {text}", file=sys.stderr, flush=True)
        return [name]
    results.add(name, measured)
    print(f"{name}: {measured.seconds:.0f} s", flush=True)
    return []


def _timed(bench: Bench, name: str, deadline: float) -> Measured:
    start = time.monotonic()
    bench.set_deadline(min(deadline, start + bench.setting.time_limit * CONTESTANTS[name].seconds))
    measured = CONTESTANTS[name].run(bench)
    return replace(measured, seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()
