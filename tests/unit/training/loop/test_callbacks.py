"""Callbacks of the training loop, called without a loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from runs.early_stopping import stopping_step
from training.events import DivergedError
from training.loop import callbacks
from training.loop.callbacks import EarlyStopping, LossWatchdog, Recording


def test_interval_between_recordings_grows_with_the_number_of_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    now = 0.0
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now))
    recorded: list[tuple[float, int]] = []
    recording = Recording(lambda log: recorded.append((now, len(log))))
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state = TrainerState()
    for second in range(1, 201):
        now = float(second)
        state.log_history += [{"loss": 1.0, "step": second}] * (1 if second <= 100 else 100)
        recording.on_log(arguments, state, TrainerControl())
    assert recorded == [(30, 30), (60, 60), (90, 90), (120, 2100), (150, 5100)], "not again before 201 s"


def log_of(*eval_losses: float) -> list[dict[str, float]]:
    """Return the log of a run that is evaluated before the first step and after every tenth."""
    return [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(eval_losses)]


@pytest.mark.parametrize(
    ("eval_losses", "threshold", "step"),
    [
        ((2.0, 1.9, 1.8, 1.7), 0.0, None),
        ((2.0, 1.9, 1.95, 1.9), 0.0, 30),
        ((2.0, 1.9, 1.95, 1.8, 1.81), 0.0, None),
        ((2.0, 1.99, 1.98), 0.05, 20),
        ((2.0, 1.99, 1.9), 0.05, None),
    ],
)
def test_training_stops_after_two_evaluations_without_improvement(
    eval_losses: tuple[float, ...], threshold: float, step: int | None, tmp_path: Path
):
    log: list[Any] = log_of(*eval_losses)
    steps = [{"step": 5, "loss": 2.0}]
    assert stopping_step([*steps, *log], 2, threshold) == step
    callback = EarlyStopping(2, threshold)
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    stopped = []
    for number in range(len(log)):
        control = TrainerControl()
        state = TrainerState(global_step=log[number]["step"], log_history=log[: number + 1])
        callback.on_log(arguments, state, control, logs=log[number])
        stopped.append(control.should_training_stop)
    assert stopped == [entry["step"] == step for entry in log]


def test_loss_that_stays_high_fails_the_run(tmp_path: Path):
    watchdog = LossWatchdog(5.0, 2, lambda: "s3://bucket/checkpoint-10")
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for losses in ((9.0,), (9.0, 4.0), (9.0, 4.0, 9.0), (9.0, 5.0)):
        state = TrainerState(log_history=[{"loss": loss} for loss in losses])
        watchdog.on_log(arguments, state, TrainerControl())
    state = TrainerState(
        global_step=12, log_history=[{"loss": 1.0}, {"loss": 6.0}, {"eval_loss": 1.0}, {"loss": 7.0}]
    )
    with pytest.raises(
        DivergedError, match=r"step 12: .* 5 .*loss_watchdog_threshold.*checkpoint-10.*learning_rate"
    ):
        watchdog.on_log(arguments, state, TrainerControl())
