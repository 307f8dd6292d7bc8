"""Tests of trackers: TensorBoard contains the metrics of a run, and a broken tracker does not stop training."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.jobs import read_metrics, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model_and_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("tracking"))


def settings(files: Path, **changes: Any) -> dict[str, Any]:
    return tiny_settings(files) | {"num_devices": 2, "max_steps": 2, "learning_rate": 1e-2, **changes}


def test_tensorboard_contains_the_metrics_and_the_config(files: Path):
    config = write_yaml(files / "tb.yaml", settings(files, run_name="tb", logger={"provider": "tensorboard"}))
    finished = run_main(config)
    assert finished.exit_code == 0, finished.errors
    assert "warning" not in finished.errors
    lines = read_metrics(files / "runs" / "tb")
    events = EventAccumulator(str(files / "runs" / "tb" / "tensorboard")).Reload()
    for name, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/learning_rate", "learning_rate"),
    ):
        tracked = [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]
        assert [(line["step"], line[key]) for line in lines if key in line] == tracked
    (text,) = events.Tensors("configuration/text_summary")
    assert b"max_steps: 2" in text.tensor_proto.string_val[0]


def test_broken_tracker_causes_one_warning(files: Path):
    not_a_directory = files / "a-file"
    not_a_directory.write_text("")
    logger = {"provider": "mlflow", "tracking_uri": not_a_directory.as_uri()}
    config = write_yaml(files / "broken.yaml", settings(files, run_name="broken", logger=logger))
    finished = run_main(config, "--json", variables={"MLFLOW_ALLOW_FILE_STORE": "true"})
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 2
    assert finished.errors.count("logger: mlflow ") == 1
