"""Processes of the GPU benchmark: each has a deadline and a log, and leaves no process behind."""

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parents[1]
_MARK = "ANNEAL_BENCHMARK_PROCESS"
"""Variable of every process of a contestant: the directory of its call and a unique token."""
_POLL_SECONDS = 0.02
_LAST_LINES = 30


class ContestantFailedError(Exception):
    """An error that contains the end of the output of a failed contestant."""


class DeadlineError(ContestantFailedError):
    """A contestant did not exit by its deadline."""


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    log: Path,
    deadline: float,
    stopped: threading.Event,
    until: Callable[[], bool] = lambda: False,
) -> bool:
    """Run a command until it exits or a condition holds, then kill it and its descendants; return whether it exited.

    Args:
        command: The command line.
        environment: Variables to add.
        directory: Directory of the call, for `kill_left`.
        log: File to which its output is appended.
        deadline: Deadline by `time.monotonic()`.
        stopped: Stops the command once it is set.
        until: The condition.

    Raises:
        ContestantFailedError: It failed or was stopped.
        DeadlineError: It did not exit by the deadline.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{_prefix(directory)}{uuid.uuid4().hex}"
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=os.environ | dict(environment) | {_MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not until():
                if stopped.is_set():
                    raise ContestantFailedError(f"interrupted; {log} ends:\n{_end_of(log)}")
                if time.monotonic() > deadline:
                    raise DeadlineError(f"stopped at its time limit; {log} ends:\n{_end_of(log)}")
                time.sleep(_POLL_SECONDS)
        finally:
            exited = process.poll() is not None
            _kill_marked(mark)
            process.wait()
    if exited and process.returncode != 0:
        raise ContestantFailedError(f"exit code {process.returncode}; {log} ends:\n{_end_of(log)}")
    return exited


def kill_left(directory: Path) -> int:
    """Kill the processes that an earlier call in this directory left because it was killed; return their number.

    The caller has locked the directory, so no other call uses it.
    """
    return _kill_marked(_prefix(directory))


def _prefix(directory: Path) -> str:
    return f"{directory.resolve()}#"


def _kill_marked(prefix: str) -> int:
    """Kill every process that has inherited such a mark, daemons of Ray included, and wait until none is alive."""
    killed = set()
    while alive := [process for process in psutil.process_iter() if _has_mark(process, prefix)]:
        for process in alive:
            killed.add(process.pid)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
    return len(killed)


def _has_mark(process: psutil.Process, prefix: str) -> bool:
    # A killed process whose parent does not reap it remains as a zombie, without an environment.
    with suppress(psutil.Error, OSError):
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and process.environ().get(_MARK, "").startswith(prefix)
    return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:])
