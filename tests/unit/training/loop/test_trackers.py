"""Local files that the trackers' own packages write, and reports of trackers that fail or hang."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from configs.schema import MlflowLogger, TensorboardLogger, WandbLogger
from tests.support.messages import assert_names
from tests.support.wandb_files import history_of, wandb_records
from training.events import Event, Notice
from training.loop import trackers
from training.loop.trackers import Logger, TrackedRun, Tracking
from utils.storage.bucket import open_store

PARAMETERS = {"model_id": "org/base", "lora_config.r": 8, "valid_path": None}
STEPS: dict[int, dict[str, Any]] = {
    0: {"eval_loss": 2.5, "epoch": 0},
    1: {"loss": 2.25, "learning_rate": 1e-4, "epoch": 0.5},
    2: {"loss": 2.0, "learning_rate": 5e-5, "epoch": 1.0},
}
Train = Callable[..., list[str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Return a function that reports steps to a tracker and returns its warnings."""
    # The simulated training takes no time, so the tracker may still be importing W&B at its end.
    monkeypatch.setattr(trackers, "_END_SECONDS", 10 * trackers._END_SECONDS)

    def report(
        settings: Logger, steps: Mapping[int, Mapping[str, Any]] = STEPS, start_step: int = 0
    ) -> list[str]:
        events: list[Event] = []
        run = TrackedRun(
            "a-run", open_store(str(tmp_path / "bucket" / "a-run")), PARAMETERS, tmp_path / "node"
        )
        tracking = Tracking(settings, run, events.append)
        arguments: Any = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[], use_cpu=True)
        state, control = TrainerState(global_step=start_step), TrainerControl()
        tracking.on_train_begin(arguments, state, control)
        for step, logs in steps.items():
            state.global_step = step
            tracking.on_log(arguments, state, control, logs=dict(logs))
        tracking.on_log(arguments, state, control, logs={"train_runtime": 1.0})
        tracking.on_train_end(arguments, state, control)
        return [event.text for event in events if isinstance(event, Notice)]

    return report


def test_tensorboard_events_are_stored_in_the_run(train: Train, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(TensorboardLogger(provider="tensorboard")) == []
    events = EventAccumulator(str(tmp_path / "bucket" / "a-run" / "tensorboard")).Reload()
    losses = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert losses == [(1, 2.25), (2, 2.0)]
    assert [(point.step, point.value) for point in events.Scalars("eval/loss")] == [(0, 2.5)]
    (text,) = events.Tensors("configuration/text_summary")
    assert b"lora_config.r: 8" in text.tensor_proto.string_val[0]


def test_resumed_run_replaces_the_tensorboard_events_of_lost_steps(train: Train, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TensorboardLogger(provider="tensorboard"))
    time.sleep(1.1)  # files are read in the order of their names, which contain the time in seconds
    train(TensorboardLogger(provider="tensorboard"), {2: {"loss": 1.75}}, start_step=1)
    events = EventAccumulator(str(tmp_path / "bucket" / "a-run" / "tensorboard")).Reload()
    losses = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert losses == [(1, 2.25), (2, 1.75)]


def test_mlflow_stores_metrics_parameters_and_tags(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a directory instead of a server
    uri = (tmp_path / "mlruns").as_uri()
    settings = MlflowLogger(provider="mlflow", tracking_uri=uri, experiment_name="tuning", tags={"team": "a"})
    assert train(settings) == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tuning")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a-run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in PARAMETERS.items()}
    assert run.data.tags["team"] == "a"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.25), (2, 2.0)]
    assert run.data.metrics["eval/loss"] == 2.5

    assert train(settings, {3: {"loss": 1.5}}, start_step=2) == []
    (same,) = client.search_runs([experiment.experiment_id])
    assert same.info.run_id == run.info.run_id, "a resumed run stays the same run"
    assert same.data.metrics["train/loss"] == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "first try"])
def test_wandb_stores_metrics_parameters_and_tags(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = WandbLogger(provider="wandb", project="tuning", name=name, group="g", tags=["a"])
    assert train(settings) == []
    (path,) = (tmp_path / "node").rglob("*.wandb")
    records = wandb_records(path)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, list(run.tags)) == ("tuning", "g", ["a"])
    assert run.display_name == (name or "a-run")
    config = {item.key: item.value_json for item in run.config.update}
    assert config["model_id"] == '"org/base"'
    assert config["lora_config.r"] == "8"
    history = history_of(records)
    assert [(point["step"], point["train/loss"]) for point in history if "train/loss" in point] == [
        ("1", "2.25"),
        ("2", "2"),
    ]
    assert [point["eval/loss"] for point in history if "eval/loss" in point] == ["2.5"]


def test_broken_tracker_is_reported_once(train: Train, tmp_path: Path):
    (tmp_path / "bucket").write_text("a file in place of the run's directory")
    (warning,) = train(TensorboardLogger(provider="tensorboard"))
    assert warning.startswith("logger: tensorboard ")
    assert_names(warning, "failed", str(tmp_path / "bucket"))


def test_hanging_tracker_is_abandoned_with_a_warning(train: Train, monkeypatch: pytest.MonkeyPatch):
    release = threading.Event()
    monkeypatch.setattr(trackers, "open_tracker", lambda *_: release.wait())
    monkeypatch.setattr(trackers, "_END_SECONDS", 0.1)
    (warning,) = train(WandbLogger(provider="wandb"))
    assert warning.startswith("logger: wandb ")
    assert_names(warning, "failed", " 0 s ")
    release.set()
