"""Runs main.py as a user does, in a process of its own: to its end, or to be looked at and hurt on the way."""

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
_LIMIT_SECONDS = 360
_LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Finished:
    """How a run of main.py ended."""

    exit_code: int
    output: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        return json.loads(self.output.splitlines()[-1])


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    """Write a config; returns its path."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def tiny_settings(files: Path) -> dict[str, Any]:
    """What every run of the tiny model says: `files` holds model/, train.jsonl and valid.jsonl, and gets runs and scratch."""
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
    """The command line, without library warnings."""
    return [sys.executable, str(PROJECT / "main.py"), str(config), *arguments]


def environment() -> dict[str, str]:
    """Ours, without a cluster of somebody else's."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run_main(
    config: Path, *arguments: str, timeout: float = 300, variables: Mapping[str, str] | None = None
) -> Finished:
    """Run main.py to its end.

    Args:
        config: The YAML.
        arguments: Overrides and options.
        timeout: Seconds.
        variables: Set on top of the environment.
    """
    try:
        done = subprocess.run(
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
        said = (error.stderr or b"").decode(errors="replace")
        raise AssertionError(f"main.py {config} has not ended in {timeout:g} s; it said:\n{said}") from None
    return Finished(done.returncode, done.stdout, done.stderr)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, from a run stored in a local directory."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Job:
    """main.py with everything that it starts."""

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
        """What it wrote to standard error so far."""
        return self._stderr.read_text("utf-8", errors="replace")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Return as soon as something is so; fail when main.py ends first, or never gets there."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.errors}"
            assert time.monotonic() < deadline, f"no {what} in {_LIMIT_SECONDS} s:\n{self.errors}"
            time.sleep(_LOOK_SECONDS)

    def wait_for_line(self, text: str) -> None:
        """Return when standard error holds the text."""
        self.wait_until(lambda: text in self.errors, text)

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers on a cluster of its own."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    def end(self) -> Finished:
        """Wait for its own end."""
        try:
            self.process.wait(_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended in {_LIMIT_SECONDS} s; it said:\n{self.errors}") from None
        return Finished(self.process.returncode, self._stdout.read_text("utf-8"), self.errors)

    def kill_all(self) -> None:
        """SIGKILL for main.py and all its descendants; returns when none of them lives."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            family = [main, *main.children(recursive=True)]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            self.process.wait()
            deadline = time.monotonic() + 30
            while alive := [process for process in family if _lives(process)]:
                assert time.monotonic() < deadline, f"still alive after SIGKILL: {alive}"
                time.sleep(_LOOK_SECONDS)


def _lives(process: psutil.Process) -> bool:
    # An orphan stays a zombie where nobody collects it.
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
    """main.py for the length of the block, by the command `within` where one is given; nothing of it is left behind."""
    job = Job(config, variables or {}, within, arguments)
    try:
        yield job
    finally:
        job.kill_all()
