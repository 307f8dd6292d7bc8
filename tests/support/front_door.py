"""Runs of main.py in forked processes that share its imports, so each starts in a tenth of a second."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.support.jobs import CompletedCommand, environment

RunCommand = Callable[..., CompletedCommand]

# One server process imports the modules of a dry run and of a small model, and each call forks it. It has run nothing of them.
fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(
    [
        "main",
        "training.launch.display",
        "training.planning.planner",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "training.models.sequence_parallel",
        "peft",
        "boto3.session",
        "s3transfer.manager",
        "pandas",
        "pyarrow.parquet",
        "jinja2",
        "PIL.ImageOps",
        "awscrt.checksums",
    ]
)
_TIMEOUT_SECONDS = 300  # for a command that hangs; an evaluation of 32 rows took 120 on a busy machine


def run_main_quickly(
    config: Path, *arguments: str, variables: Mapping[str, str] | None = None
) -> CompletedCommand:
    """Run main.py on a config until it exits.

    Args:
        config: The YAML; the output is written beside it.
        arguments: Overrides and options.
        variables: Environment variables to add.
    """
    return run_command_quickly([str(config), *arguments], config, variables=variables)


def run_command_quickly(
    arguments: Sequence[str], beside: Path, *, variables: Mapping[str, str] | None = None
) -> CompletedCommand:
    """Run main.py with any arguments until it exits; its output is written to files beside a path."""
    stdout, stderr = beside.with_suffix(".stdout"), beside.with_suffix(".stderr")
    process = fork_server.Process(
        target=_main, args=(list(arguments), {**environment(), **(variables or {})}, stdout, stderr)
    )
    process.start()
    process.join(_TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"main.py {' '.join(arguments)} ran for more than {_TIMEOUT_SECONDS} seconds")
    return CompletedCommand(process.exitcode, stdout.read_text("utf-8"), stderr.read_text("utf-8"))


def _main(arguments: list[str], variables: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    from main import main

    sys.exit(main(arguments))
