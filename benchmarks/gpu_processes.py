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
_POLL_SECONDS = 0.02
_LAST_LINES = 30


class ContestantFailedError(Exception):
    """An error that contains the end of the output of a failed contestant."""


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    deadline: float,
    stopped: threading.Event,
    until: Callable[[], bool] = lambda: False,
) -> bool:
    """Run a command until it exits or a condition holds, then kill it and its descendants; return whether it exited.

    Args:
        command: The command line.
        environment: Variables to add.
        log: File to which its output is appended.
        deadline: Deadline by `time.monotonic()`.
        stopped: Stops the command once it is set.
        until: The condition.

    Raises:
        ContestantFailedError: It failed, was stopped or did not exit by the deadline.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=os.environ | dict(environment) | {_MARK: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not until():
                if stopped.is_set() or time.monotonic() > deadline:
                    cause = "interrupted" if stopped.is_set() else "stopped at its time limit"
                    raise ContestantFailedError(f"{cause}; {log} ends:\n{_end_of(log)}")
                time.sleep(_POLL_SECONDS)
        finally:
            exited = process.poll() is not None
            kill_marked(token)
            process.wait()
    if exited and process.returncode != 0:
        raise ContestantFailedError(f"exit code {process.returncode}; {log} ends:\n{_end_of(log)}")
    return exited


def kill_marked(token: str) -> None:
    """Kill every process that has inherited this mark, daemons of Ray included, and wait until none is alive."""
    while alive := [process for process in psutil.process_iter() if _has_mark(process, token)]:
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def _has_mark(process: psutil.Process, token: str) -> bool:
    # A killed process whose parent does not reap it remains as a zombie, without an environment.
    with suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == token
    return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:])
