"""Callbacks of the training loop, called without a loop."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from configs.schema import FinetuneConfig
from runs.early_stopping import stopping_step
from tests.support.messages import assert_names
from training.events import DivergedError
from training.loop import callbacks
from training.loop.callbacks import EarlyStopping, LossWatchdog, Recording, UnchangedWeights
from training.models.files import ModelError
from utils.files import FilesInUse


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
    stopped, saved = [], []
    for number in range(len(log)):
        control = TrainerControl()
        state = TrainerState(global_step=log[number]["step"], log_history=log[: number + 1])
        callback.on_log(arguments, state, control, logs=log[number])
        stopped.append(control.should_training_stop)
        saved.append(control.should_save)
    assert stopped == saved == [entry["step"] == step for entry in log]


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


def due_steps(settings: dict[str, Any], *, steps_per_epoch: int, steps: int) -> tuple[list[int], list[int]]:
    """Return (steps with an evaluation, steps with a checkpoint)."""
    config = FinetuneConfig(model_id="a", train_path="b", **settings)
    schedule = callbacks.Schedule(config, steps_per_epoch, steps, evaluates=True)
    evaluated, saved = [], []
    for step in range(1, steps + 1):
        state, control = TrainerState(global_step=step, max_steps=steps), TrainerControl()
        schedule.on_step_end(cast(Any, None), state, control)
        evaluated += [step] if control.should_evaluate else []
        saved += [step] if control.should_save else []
    return evaluated, saved


def every(frequency: float, unit: str = "epochs") -> dict[str, Any]:
    return {"checkpoint_and_evaluation_frequency": {"unit": unit, "frequency": frequency}}


@pytest.mark.parametrize(
    ("settings", "evaluated", "saved"),
    [
        ({}, [10, 20, 25], [10, 20, 25]),
        (every(6, "steps"), [6, 12, 18, 24, 25], [6, 12, 18, 24, 25]),
        (every(2), [20, 25], [20, 25]),
        (every(2.0), [20, 25], [20, 25]),
        # Four in each epoch of ten steps, also where ten steps have no quarters.
        (every(0.25), [3, 5, 8, 10, 13, 15, 18, 20, 23, 25], [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),
        (every(0.7), [7, 14, 21, 25], [7, 14, 21, 25]),
        (every(0.01), list(range(1, 26)), list(range(1, 26))),
        ({"eval_steps": 4, "save_steps": 10}, [4, 8, 12, 16, 20, 24, 25], [10, 20, 25]),
        ({"eval_steps": 4}, [4, 8, 12, 16, 20, 24, 25], [10, 20, 25]),
        ({"save_steps": 0.3} | every(5, "steps"), [5, 10, 15, 20, 25], [8, 16, 24, 25]),
        ({"eval_steps": 100, "save_steps": 100}, [25], [25]),
    ],
)
def test_evaluations_and_checkpoints_have_their_own_intervals(
    settings: dict[str, Any], evaluated: list[int], saved: list[int]
):
    assert due_steps(settings, steps_per_epoch=10, steps=25) == (evaluated, saved)


@pytest.mark.parametrize("change", ["written to", "truncated", "replaced", "removed"])
def test_step_is_neither_logged_nor_committed_once_a_mapped_weight_file_has_changed(
    change: str, tmp_path: Path
):
    """A mapping shows what is written to its file. It keeps the content of a file that is replaced or removed."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100))
    os.utime(weights, (0, 0))  # the clock of some kernels does not tick between two writes
    checked = UnchangedWeights(FilesInUse([weights]), lambda: "s3://b/run/checkpoints/step-000002")
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state = TrainerState(global_step=4)
    checked.on_save(arguments, state, TrainerControl())

    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x" * 100)
    if change == "replaced":
        other.replace(weights)
    elif change == "removed":
        weights.unlink()
    else:
        with weights.open("r+b") as file:
            file.truncate(50) if change == "truncated" else file.write(b"x")
    if change in ("replaced", "removed"):
        checked.on_step_end(arguments, state, TrainerControl())
        checked.on_save(arguments, state, TrainerControl())
        return
    for check in (checked.on_step_end, checked.on_save):
        with pytest.raises(ModelError) as raised:
            check(arguments, state, TrainerControl())
        assert_names(str(raised.value), "step 4", str(weights), "step-000002", "same command")
