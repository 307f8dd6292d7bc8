"""Signals in every phase of the commands that use a checkpoint or translate a YAML: the exit code, one line, nothing left behind.

`make test-all` sends a sample; `make test-resume` sends each signal once and twice in every phase (RESUME_GRID=1).
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import PROJECT, SENT, command_line, environment
from tests.support.tiny_model import write_data
from tests.support.trained_runs import store_adapter_run
from utils.storage.bucket import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MANY_ROWS = 3000


class Command:
    """A running command of main.py, and what it has written so far."""

    def __init__(self, directory: Path, arguments: list[str]):
        self._files = directory / "stdout", directory / "stderr"
        with self._files[0].open("wb") as output, self._files[1].open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", *arguments],
                cwd=PROJECT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )

    @property
    def output(self) -> str:
        return self._files[0].read_text()

    @property
    def errors(self) -> str:
        return self._files[1].read_text()

    def handles_signals(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.M)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _shows(text: str) -> Callable[[Command], bool]:
    return lambda command: text in command.errors


EVALUATE = "evaluate RUN --data ROWS --match text --num-devices 2 --device cpu --max-new-tokens 64"
CHAT = "chat RUN --prompt Hello --max-new-tokens 100000"
PHASES: dict[str, tuple[str, Callable[[Command], bool]]] = {
    "evaluate: loading the program": (EVALUATE, Command.handles_signals),
    "evaluate: starting the workers": (EVALUATE, _shows("starting the workers")),
    "evaluate: generating": (EVALUATE, _shows("generating")),
    "export: loading the weights": ("export RUN --to NEW", _shows("loading the weights")),
    "export: writing the weights": ("export RUN --to NEW", _shows("writing the weights")),
    "chat: loading": (CHAT, _shows("loading")),
    "chat: answering": (CHAT, lambda command: bool(command.output)),
    "convert": ("convert OTHER --to NEW", Command.handles_signals),
    "serve: loading the program": ("serve OTHER", Command.handles_signals),
}
"""The command line of each phase, and when the phase has begun."""
GRID = [(phase, sent) for phase in PHASES for sent in SENT]
SAMPLE = [
    ("chat: answering", "SIGINT"),
    ("convert", "SIGINT twice"),
]


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a run and rows."""
    directory = tmp_path_factory.mktemp("commands")
    write_data(directory, train_rows=4, valid_rows=MANY_ROWS)
    scratch = str(directory / "scratch")
    store_adapter_run(open_store(str(directory / "runs")), "run", tiny_model, {"r": 4}, output_dir=scratch)
    os.mkfifo(
        directory / "other.yaml"
    )  # the commands that read it take too little time to be interrupted on the way
    return directory


def paths_of(files: Path, directory: Path) -> dict[str, Path]:
    """Return the paths that the words in capitals of a command line stand for."""
    return {
        "RUN": files / "runs" / "run",
        "ROWS": files / "valid.jsonl",
        "OTHER": files / "other.yaml",
        "NEW": directory / "new",
    }


@contextmanager
def begun(
    line: str, has_begun: Callable[[Command], bool], paths: Mapping[str, Path], directory: Path
) -> Iterator[tuple[Command, list[psutil.Process]]]:
    """Run a command until a phase has begun; yield it with its processes, and kill it when the block exits."""
    command = Command(directory, [str(paths.get(word, word)) for word in line.split()])
    try:
        deadline = time.monotonic() + 300
        while not has_begun(command):
            assert command.process.poll() is None, command.errors
            assert time.monotonic() < deadline, command.errors
            time.sleep(0.005)
        yield command, psutil.Process(command.process.pid).children(recursive=True)
    finally:
        command.process.kill()
        command.process.wait()


def only_error(command: Command, exit_code: int, processes: list[psutil.Process]) -> str:
    """Return the only error of a command that has exited with a code and without leaving a process."""
    assert command.process.wait(120) == exit_code, command.errors
    assert "Traceback" not in command.errors
    (error,) = [line for line in command.errors.splitlines() if "error: " in line]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    return error


@pytest.mark.parametrize(("phase", "sent"), GRID if os.environ.get("RESUME_GRID") else SAMPLE)
def test_signal_ends_a_command_with_its_code_and_one_line(phase: str, sent: str, files: Path, tmp_path: Path):
    paths = paths_of(files, tmp_path)
    before = sorted(paths["RUN"].rglob("*"))
    first, *second = SENT[sent]
    with begun(*PHASES[phase], paths, tmp_path) as (command, processes):
        command.process.send_signal(first)
        for number in second:
            time.sleep(0.1)  # two pending signals of one kind are one signal
            command.process.send_signal(number)
        assert first.name in only_error(command, 128 + first, processes)
    assert sorted(paths["RUN"].rglob("*")) == before, "left behind in the run"
    assert not paths["NEW"].exists(), "an export or a YAML that is not complete"


def test_evaluation_reports_a_lost_worker(files: Path, tmp_path: Path):
    paths = paths_of(files, tmp_path)
    with begun(*PHASES["evaluate: generating"], paths, tmp_path) as (command, processes):
        workers = [process for process in processes if "_Worker" in command_line(process)]
        assert len(workers) == 2
        workers[0].kill()
        error = only_error(command, 1, processes)
    assert "worker lost: " in error
    assert not (paths["RUN"] / "evaluations").exists()
