"""main.py in a process of its own, as a user runs it, without paying for its imports each time."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Each call forks from one process that holds what a dry run imports; nothing of main.py has run in it.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "main",
        "training.display",
        "training.plan",
        "transformers.models.auto.tokenization_auto",
        "boto3.session",
        "s3transfer.manager",
        "pyarrow.parquet",
        "awscrt.checksums",
    ]
)
_LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """How main.py ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


def run_main(
    arguments: Sequence[str], *, logs: Path, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run `python main.py ARGUMENTS` in this process's environment and the variables given on top."""
    stdout, stderr = logs / "stdout", logs / "stderr"
    process = _processes.Process(
        target=_main, args=(list(arguments), {**os.environ, **(environment or {})}, stdout, stderr)
    )
    process.start()
    process.join(_LIMIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"main.py {arguments} ran for more than {_LIMIT_SECONDS} seconds")
    return Outcome(process.exitcode, stdout.read_text("utf-8"), stderr.read_text("utf-8"))


def _main(arguments: list[str], environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    from main import main

    sys.exit(main(arguments))
