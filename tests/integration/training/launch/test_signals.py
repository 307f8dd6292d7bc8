"""Signals in every phase of a run: the exit code, one line that names the signal, and nothing left behind.

`make test-all` sends SIGTERM in every phase, and SIGINT twice in two of them; `make test-resume` sends each once and twice in
every phase (RESUME_GRID=1).
"""

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runs.summaries import read_run
from tests.support.jobs import (
    PROJECT,
    SENT,
    Job,
    command,
    descendants,
    environment,
    started,
    tiny_settings,
    write_yaml,
)
from tests.support.tiny_model import make_model_and_data

pytestmark = pytest.mark.timeout(400)

STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("signals"))


def _descendants(job: Job) -> list[psutil.Process]:
    return psutil.Process(job.process.pid).children(recursive=True)


def _handles_signals(job: Job) -> bool:
    status = Path(f"/proc/{job.process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.M)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


PHASES: dict[str, tuple[Callable[[Job], bool], int]] = {
    "loading the program": (_handles_signals, 10_000),
    "planning": (lambda job: "checking the rows" in job.errors, 10_000),
    "starting Ray": (lambda job: bool(descendants(job.process.pid, "gcs_server")), 10_000),
    "starting the workers": (lambda job: bool(job.workers()), 10_000),
    "loading the model": (lambda job: "building the model" in job.errors, 10_000),
    "training": (lambda job: "step 3/" in job.errors, 10_000),
    "committing": (lambda job: "checkpoint " in job.errors, 10_000),
    "after the last step": (lambda job: f"step {STEPS}/" in job.errors, STEPS),
    "evaluating at the end": (
        lambda job: "evaluating" in job.errors.partition(f"step {STEPS}/")[2],
        STEPS,
    ),
}
"""When each phase has begun, and the steps of the run. While it trains, the run commits a checkpoint in every step."""

GRID = [(phase, sent) for phase in PHASES for sent in SENT]
SAMPLE = [
    *((phase, "SIGTERM") for phase in PHASES if phase not in ("committing", "after the last step")),
    ("loading the program", "SIGINT twice"),
    ("training", "SIGINT twice"),
]
FAST = {("loading the program", "SIGINT twice"), ("starting Ray", "SIGTERM")}


@pytest.mark.parametrize(
    ("phase", "sent"),
    [
        pytest.param(phase, sent, marks=() if (phase, sent) in FAST else pytest.mark.slow)
        for phase, sent in (GRID if os.environ.get("RESUME_GRID") else SAMPLE)
    ],
)
def test_signal_ends_the_run_with_its_code_and_one_line(phase: str, sent: str, files: Path, tmp_path: Path):
    has_begun, steps = PHASES[phase]
    name = f"{phase}-{sent}".replace(" ", "-").lower()
    settings = {
        "run_name": name,
        "num_devices": 1,
        "train_batch_size_per_device": 4,
        "max_steps": steps,
        "valid_path": str(files / "valid.jsonl") if phase == "evaluating at the end" else None,
        "lora_config": {"r": 4},
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
    }
    config = write_yaml(tmp_path / "run.yaml", tiny_settings(files) | settings)
    first, *second = SENT[sent]
    with started(config) as job:
        job.wait_until(lambda: has_begun(job), phase)
        processes = _descendants(job)
        job.process.send_signal(first)
        for number in second:
            time.sleep(0.1)  # two pending signals of one kind are one signal
            if job.process.poll() is None:
                job.process.send_signal(number)
        finished = job.end()
    run = files / "runs" / name
    lines = [line for line in finished.errors.splitlines() if first.name in line]
    completed = bool(finished.output) and finished.result["status"] == "completed"
    assert "Traceback" not in finished.errors
    if completed:
        assert steps == STEPS, "only then is there nothing left to stop"
        assert (finished.exit_code, lines) == (0, [])
    else:
        assert finished.exit_code == 128 + first, finished.errors
        assert len(lines) == 1, finished.errors
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*")) if run.exists() else []
    if "config.yaml" not in left:  # training had not started
        assert not run.exists(), f"left behind: {left}"
    assert not [path for path in left if path.startswith("claim")], "the lease is held"
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.slow
def test_run_whose_terminal_closes_commits_a_checkpoint(files: Path, tmp_path: Path):
    settings = {
        "run_name": "closed",
        "num_devices": 1,
        "train_batch_size_per_device": 4,
        "max_steps": 10_000,
        "valid_path": None,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10_000},
    }
    config = write_yaml(tmp_path / "run.yaml", tiny_settings(files) | settings)
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *command(config)],
        cwd=PROJECT,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        shown = b""
        while b"tokens/s" not in shown:  # after the first step
            shown += os.read(controller, 65_536)
        processes = psutil.Process(process.pid).children(recursive=True)
        os.close(controller)  # the kernel sends SIGHUP
        process.send_signal(signal.SIGHUP)  # and so does the shell
        assert process.wait(120) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    result = read_run(str(files / "runs" / "closed")).result
    assert result is not None
    assert (result.status, result.reason) == ("stopped", "SIGHUP")
    assert result.train_steps >= 1
    assert result.last_checkpoint
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
