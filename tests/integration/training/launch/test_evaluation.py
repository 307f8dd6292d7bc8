"""Runs with several validation sets, early stopping and a loss watchdog."""

import json
from pathlib import Path

import pytest

from tests.support.front_door import run_command_quickly
from tests.support.jobs import read_metrics, run_main, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model, write_data, write_preference_pairs, write_unpaired_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    make_model(directory / "model")
    write_data(directory, train_rows=24, valid_rows=11)
    train, valid = write_preference_pairs(directory, train_rows=24, valid_rows=11)
    for pairs in (train, valid):
        write_unpaired_rows(pairs, directory / pairs.name.replace("pairs", "rated"))
    return directory


def test_run_stops_once_the_first_validation_set_stops_improving(files: Path):
    """A learning rate this high lets the loss of the validation rows rise from the first evaluation on."""
    lines = (files / "valid.jsonl").read_text().splitlines(keepends=True)
    (files / "math.jsonl").write_text("".join(lines[:5]))
    (files / "chat.jsonl").write_text("".join(lines[5:]))
    config = write_yaml(
        files / "stopped.yaml",
        tiny_settings(files)
        | {
            "run_name": "stopped",
            "valid_path": {"math": str(files / "math.jsonl"), "chat": [str(files / "chat.jsonl")]},
            "train_batch_size_per_device": 8,
            "num_epochs": 20,
            "learning_rate": 0.5,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
            "early_stopping_patience": 3,
            "early_stopping_threshold": 0.01,
        },
    )
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    result = finished.result
    assert result["status"] == "completed"
    assert_names(result["reason"], "stopped early", "of 60", "early_stopping_patience")
    losses = result["eval_losses"]
    assert losses[-1]["step"] == result["train_steps"] < 60
    for loss in losses:
        assert loss["figures"]["math_loss"] == loss["eval_loss"] != loss["figures"]["chat_loss"]
    best = min((loss for loss in losses if loss["step"]), key=lambda loss: loss["eval_loss"])
    assert result["best_checkpoint"].endswith(f"/checkpoints/step-{best['step']:06d}")

    # A driver that is lost before it writes the result leaves the same checkpoints; the command trains no further step.
    (files / "runs" / "stopped" / "result.json").unlink()
    resumed = run_main(config, "--json")
    assert resumed.exit_code == 0, resumed.errors
    assert resumed.result["train_steps"] == result["train_steps"]
    assert resumed.result["reason"] == result["reason"]

    exported = run_command_quickly(
        ["export", result["run_uri"], "--dtype", "fp32", "--json"], files / "export"
    )
    assert exported.exit_code == 0, exported.errors
    assert json.loads(exported.output)["verification"]["source"] == "validation rows"


def test_loss_above_the_watchdog_fails_the_run(files: Path):
    config = write_yaml(
        files / "watched.yaml",
        tiny_settings(files)
        | {
            "run_name": "watched",
            "max_steps": 6,
            "loss_watchdog_threshold": 0.5,
            "loss_watchdog_patience": 2,
        },
    )
    finished = run_main(config)
    assert finished.exit_code == 1
    assert_names(finished.output + finished.errors, "step 2", "loss_watchdog_threshold", "learning_rate")


def test_unpaired_rows_train_alike_on_one_and_on_two_workers(files: Path):
    """The eval loss is exact; the training loss depends on the rows from which a batch estimates the divergence."""
    evaluated = {}
    for workers in (1, 2):
        config = write_yaml(
            files / f"rated-{workers}.yaml",
            tiny_settings(files)
            | {
                "run_name": f"rated-{workers}",
                "train_path": str(files / "train-rated.jsonl"),
                "valid_path": str(files / "valid-rated.jsonl"),
                "task": "preference_tuning",
                "preference_tuning_config": {"loss": "kto", "desirable_weight": 0.5},
                "lora_config": {"r": 4},
                "num_devices": workers,
                "train_batch_size_per_device": 8 // workers,
                "num_epochs": 2,
                "learning_rate": 1e-2,
            },
        )
        finished = run_main(config, "--json")
        assert finished.exit_code == 0, finished.errors
        evaluated[workers] = finished.result["eval_losses"]
        logged = [line for line in read_metrics(files / "runs" / f"rated-{workers}") if "loss" in line]
        assert all("rewards/chosen" in line and "rewards/accuracies" not in line for line in logged)
    assert [loss["eval_loss"] for loss in evaluated[1]] == pytest.approx(
        [loss["eval_loss"] for loss in evaluated[2]], abs=1e-4
    )
    first, *_, last = evaluated[1]
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["rewards/margins"] > 0
