"""Keys of the validation rows reach the prepared rows, and those of Adam the optimizer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from configs.loading import load_config
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.tiny_model import make_model_and_data
from training.data.prepared import PreparedData
from training.loop.trainers import trainer_arguments
from training.planning.endpoints import ClusterTarget
from training.planning.plan import RunPlan
from training.planning.planner import make_plan

Planned = Callable[..., tuple[RunPlan, PreparedData, PreparedData]]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Return a function that plans a run with settings and returns its plan and its rows."""
    files = make_model_and_data(tmp_path)

    def plan_of(**settings: Any) -> tuple[RunPlan, PreparedData, PreparedData]:
        given = {key: value for key, value in (tiny_settings(files) | settings).items() if value is not None}
        plan, _, (train, valid) = make_plan(
            load_config(write_yaml(tmp_path / "run.yaml", given)), target=ClusterTarget(None)
        )
        return plan, train, valid

    return plan_of


def rows_of(prepared: PreparedData) -> list[int]:
    assert len({*prepared.index.row.tolist()}) == prepared.summary.rows
    return prepared.index.row.tolist()


def test_valid_split_gives_each_training_row_to_one_side(planned: Planned):
    _, whole, _ = planned()
    split: dict[str, Any] = {"valid_path": None, "valid_split": 0.3}
    plan, train, valid = planned(**split)
    assert sorted(rows_of(train) + rows_of(valid)) == rows_of(whole)
    assert 0 < valid.summary.rows < train.summary.rows
    assert plan.data.valid == valid.summary.fingerprint
    assert rows_of(planned(**split)[2]) == rows_of(valid)
    assert rows_of(planned(**split, seed=7)[2]) != rows_of(valid)


def test_rows_of_each_side_are_limited(planned: Planned):
    _, train, valid = planned(max_train_rows=7, max_valid_rows=3)
    assert (rows_of(train), rows_of(valid)) == ([*range(1, 8)], [1, 2, 3])
    _, _, valid = planned(valid_path=None, valid_split=0.3, max_valid_rows=2)
    assert valid.summary.rows == 2


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Be the only process of a group, as a worker of one device is."""
    file = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_settings_of_adam_reach_the_optimizer(planned: Planned, tmp_path: Path):
    plan, _, _ = planned(adam_beta1=0.8, adam_beta2=0.93, adam_epsilon=1e-5)
    arguments = trainer_arguments(plan, tmp_path / "out", devices=1, eval_first=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    optimizer = Trainer(model, arguments).create_optimizer()
    assert optimizer is not None
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.93), 1e-5)
