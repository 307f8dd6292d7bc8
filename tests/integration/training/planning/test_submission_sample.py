"""Before a run is submitted, the first rows of each source are checked here; the job checks all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.loading import LoadedConfig, load_config
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model_and_data
from training.data.errors import DataError
from training.data.prepared import keep_prepared
from training.planning import planner
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan, plan_submission
from training.planning.report import CheckedSample, PlanReport

JOB_SERVER = ClusterTarget("http://head:8265")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model, 40 training rows and their validation rows; 10 rows of a source are a sample."""
    monkeypatch.setattr(planner, "_SAMPLE_ROWS", 10)
    return make_model_and_data(tmp_path)


@pytest.fixture
def run(files: Path) -> Callable[..., LoadedConfig]:
    def load(**changes: Any) -> LoadedConfig:
        return load_config(write_yaml(files / "run.yaml", tiny_settings(files) | changes))

    return load


def check(run: LoadedConfig) -> PlanReport | CheckedSample:
    return plan_submission(run, target=JOB_SERVER, progress=lambda *_: None)


def write_bad_row(files: Path, row: int) -> None:
    lines = (files / "train.jsonl").read_text().splitlines()
    lines[row - 1] = json.dumps({"messages": [{"role": "robot", "content": "4"}]})
    (files / "train.jsonl").write_text("\n".join(lines))


def test_a_sample_of_many_rows_is_checked(files: Path, run: Callable[..., LoadedConfig]):
    write_bad_row(files, 11)
    sample = check(run(valid_path=None))
    assert sample == CheckedSample(10, None)
    assert check(run(valid_path=None, run_name="known")) == CheckedSample(10, f"{files}/runs/known")
    write_bad_row(files, 10)
    with pytest.raises(DataError) as caught:
        check(run(valid_path=None))
    assert_names(str(caught.value), f"{files}/train.jsonl:10: ", "robot", "1 of 10 rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    "few", [{"max_train_rows": 9, "max_valid_rows": 3}, {"max_train_rows": 10, "max_valid_rows": 10}]
)
def test_few_rows_are_planned_completely(run: Callable[..., LoadedConfig], few: dict[str, int]):
    report = check(run(**few))
    assert isinstance(report, PlanReport)
    assert report.train.rows == few["max_train_rows"]


@pytest.mark.slow
def test_prepared_rows_are_planned_completely(run: Callable[..., LoadedConfig]):
    plan, expected, prepared = make_plan(run(), target=JOB_SERVER)
    for rows in prepared:
        keep_prepared(rows, plan.prepared)
    report = check(run())
    assert isinstance(report, PlanReport)
    assert report.run_uri == expected.run_uri
