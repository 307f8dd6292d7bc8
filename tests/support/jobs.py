"""Helpers that run main.py in a separate process, as a user does: until it exits, or observed and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

PROJECT = Path(__file__).resolve().parents[2]
SENT = {
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}
"""The signals that tests send to a command in each phase, by name."""
_TIMEOUT_SECONDS = 360
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class CompletedCommand:
    """Exit code and output of main.py."""

    exit_code: int
    output: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """Return the JSON object on the last line of standard output."""
        return json.loads(self.output.splitlines()[-1])


def error_of(finished: CompletedCommand) -> str:
    """Check that a command was rejected with one error and nothing else, and return its message."""
    assert finished.exit_code == 2, finished
    assert finished.output == ""
    assert "Traceback" not in finished.errors
    assert finished.errors.count("error: ") == 1, finished.errors
    return finished.errors.partition("error: ")[2]


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    """Write a config and return its path."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def tiny_settings(files: Path) -> dict[str, Any]:
    """Return the settings that all runs of the tiny model share.

    Args:
        files: Directory with model/, train.jsonl and valid.jsonl, to which the run adds runs/ and scratch/.
    """
    return {
        "model_id": str(files / "model"),
        "train_path": str(files / "train.jsonl"),
        "valid_path": str(files / "valid.jsonl"),
        "storage_path": str(files / "runs"),
        "output_dir": str(files / "scratch"),
        "device": "cpu",
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "max_failures": 0,
    }


def command(config: Path, *arguments: str) -> list[str]:
    """Return the command line of main.py."""
    return [sys.executable, str(PROJECT / "main.py"), str(config), *arguments]


def environment() -> dict[str, str]:
    """Return the environment without RAY_ADDRESS, so that a run joins no existing cluster, and without RAY_AUTH_MODE.

    `ray.init` in a test's own process sets RAY_AUTH_MODE where the user has a ~/.ray/auth_token.
    """
    return {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAY_AUTH_MODE"}}


def run_main(
    config: Path, *arguments: str, timeout: float = 300, variables: Mapping[str, str] | None = None
) -> CompletedCommand:
    """Run main.py until it exits.

    Args:
        config: The YAML.
        arguments: Overrides and options.
        timeout: Timeout in seconds.
        variables: Environment variables to add.
    """
    try:
        completed = subprocess.run(
            command(config, *arguments),
            cwd=PROJECT,
            env=environment() | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stderr or b"").decode(errors="replace")
        raise AssertionError(
            f"main.py {config} did not exit within {timeout:g} s; stderr:\n{output}"
        ) from None
    return CompletedCommand(completed.returncode, completed.stdout, completed.stderr)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl from a run that is stored in a local directory."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Job:
    """A running main.py with all its descendants."""

    def __init__(
        self, config: Path, variables: Mapping[str, str], within: Sequence[str], arguments: Sequence[str]
    ):
        self._stdout, self._stderr = config.with_suffix(".stdout"), config.with_suffix(".stderr")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*within, *command(config, *arguments, "--json")],
                cwd=PROJECT,
                env=environment() | dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                process_group=0,
            )

    @property
    def errors(self) -> str:
        """Return what main.py has written to standard error so far."""
        return self._stderr.read_text("utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], description: str) -> None:
        """Wait until a condition holds; fail if main.py exits first or the timeout expires."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"main.py exited before {description}:\n{self.errors}"
            assert time.monotonic() < deadline, (
                f"no {description} within {_TIMEOUT_SECONDS} s:\n{self.errors}"
            )
            time.sleep(_POLL_SECONDS)

    def wait_for_line(self, text: str) -> None:
        """Wait until standard error contains the text."""
        self.wait_until(lambda: text in self.errors, text)

    def workers(self) -> list[psutil.Process]:
        """Return the Ray Train workers if main.py started the cluster itself."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in command_line(child)]

    def end(self) -> CompletedCommand:
        """Wait until main.py exits and return its exit code and output."""
        try:
            self.process.wait(_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"main.py did not exit within {_TIMEOUT_SECONDS} s; stderr:\n{self.errors}"
            ) from None
        return CompletedCommand(self.process.returncode, self._stdout.read_text("utf-8"), self.errors)

    def kill_all(self) -> None:
        """Kill main.py and all its descendants with SIGKILL, and wait until none is alive."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            processes = [main, *main.children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            self.process.wait()
            deadline = time.monotonic() + 30
            while alive := [process for process in processes if _is_alive(process)]:
                assert time.monotonic() < deadline, f"still alive after SIGKILL: {alive}"
                time.sleep(_POLL_SECONDS)


def descendants(process: int, name: str) -> list[psutil.Process]:
    """Return the descendants of a process that have this name."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just exited
            if child.name() == name:
                found.append(child)
    return found


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process; "" if it has exited."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has just exited
        return ""


def _is_alive(process: psutil.Process) -> bool:
    # A killed orphan remains a zombie if no process reaps it.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started(
    config: Path,
    variables: Mapping[str, str] | None = None,
    *,
    within: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> Iterator[Job]:
    """Run main.py for the duration of the block, and kill all its processes at the end.

    Args:
        config: The YAML.
        variables: Environment variables to add.
        within: The beginning of a command line that runs main.py, such as `unshare` with its options.
        arguments: Overrides and options.
    """
    job = Job(config, variables or {}, within, arguments)
    try:
        yield job
    finally:
        job.kill_all()
