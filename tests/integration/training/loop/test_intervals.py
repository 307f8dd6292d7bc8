"""Runs with intervals of their own for evaluations and checkpoints, and with a schedule that takes arguments."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import injection
from tests.support.grids import only_in_test_resume
from tests.support.jobs import read_metrics, run_main, started, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data

pytestmark = pytest.mark.slow

STEPS, WARMUP, PEAK, END = 120, 12, 1e-3, 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intervals")
    make_model(directory / "model")
    write_data(directory, train_rows=40, valid_rows=3)
    return directory


def settings(files: Path, name: str) -> dict[str, Any]:
    return tiny_settings(files) | {
        "run_name": name,
        "max_steps": STEPS,
        "learning_rate": PEAK,
        "warmup_ratio": WARMUP / STEPS,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": END},
        "lora_config": {"r": 4, "lora_dropout": 0.1},
        "eval_first": False,
        "eval_steps": 0.25,
        "save_steps": 45,
        "num_checkpoints_to_keep": 10,
    }


def learning_rate(step: int) -> float:
    """Return the learning rate of an optimizer step, counted from 1: a rise from 0, then half a cosine down to END * PEAK."""
    if step <= WARMUP:
        return PEAK * (step - 1) / WARMUP
    progress = (step - 1 - WARMUP) / (STEPS - WARMUP)
    return PEAK * (END + (1 - END) * 0.5 * (1 + math.cos(math.pi * progress)))


@only_in_test_resume
def test_stopped_run_resumes_both_intervals_and_the_schedule(files: Path, tmp_path: Path):
    """Each step has the learning rate of the schedule, and the loss of an uninterrupted run."""
    complete = run_main(write_yaml(tmp_path / "complete.yaml", settings(files, "complete")), "--json")
    assert complete.exit_code == 0, complete.errors
    assert [loss["step"] for loss in complete.result["eval_losses"]] == [30, 60, 90, 120]
    kept = sorted(path.name for path in (files / "runs" / "complete" / "checkpoints").iterdir())
    assert kept == ["step-000045", "step-000090", "step-000120"]

    config = write_yaml(tmp_path / "stopped.yaml", settings(files, "stopped"))
    with started(config, injection(tmp_path / "ledger", hold="in_step_until_stop:6")) as job:
        job.wait_for_line("step 5/")
        os.killpg(job.process.pid, signal.SIGTERM)
        stopped = job.end()
    assert stopped.exit_code == 128 + signal.SIGTERM, stopped.errors
    assert stopped.result["train_steps"] < STEPS
    resumed = run_main(config, "--json")
    assert resumed.exit_code == 0, resumed.errors
    assert [loss["step"] for loss in resumed.result["eval_losses"]] == [30, 60, 90, 120]

    lines = {name: read_metrics(files / "runs" / name) for name in ("complete", "stopped")}
    losses = {name: [line["loss"] for line in log if "loss" in line] for name, log in lines.items()}
    assert losses["stopped"] == losses["complete"]
    rates = {line["step"]: line["learning_rate"] for line in lines["stopped"] if "loss" in line}
    assert list(rates) == list(range(1, STEPS + 1))
    assert rates == pytest.approx({step: learning_rate(step) for step in rates}, rel=1e-6)
