"""Tests of `train_batch_size_per_device: auto`: the plan chooses the batch size, and a resumed run keeps it."""

import re
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from tests.support.front_door import run_main_quickly
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.stored_runs import commit_plan
from tests.support.tiny_model import make_model_and_data
from training.data.batches import pad_to_multiple_of
from training.data.prepared import fetch_prepared
from training.loop.trainers import collate_rows
from training.loop.worker import model_request
from training.models.attention import Attention
from training.planning.endpoints import ClusterTarget
from training.planning.plan import RunPlan
from training.planning.planner import make_plan

AUTO: dict[str, Any] = {"train_batch_size_per_device": "auto", "train_batch_size": 16}
ON_A10G: dict[str, Any] = {"device": "cuda", "worker_resources": {"accelerator_type:A10G": 0.001}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("batch_size"))


def dry_run(files: Path, name: str, **changes: Any) -> dict[str, Any]:
    config = write_yaml(files / f"{name}.yaml", tiny_settings(files) | {"run_name": name} | changes)
    finished = run_main_quickly(config, "--dry-run", "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


def plan_of(files: Path, name: str, **changes: Any) -> RunPlan:
    """Plan a run in this process, without its command line."""
    config = write_yaml(files / f"{name}.yaml", tiny_settings(files) | {"run_name": name} | changes)
    plan, _, _ = make_plan(load_config(config), target=ClusterTarget(None))
    return plan


def test_resumed_run_keeps_its_batch_size(files: Path):
    """The batch size is also kept with more memory, and by another run that resumes from its checkpoint."""
    plan_with_four = dry_run(files, "four", train_batch_size_per_device=4, gradient_accumulation_steps=4)
    memory_for_four = 1_000_000_000 + int(plan_with_four["memory"]["total"] / 0.9) + 1
    original = plan_of(files, "kept", **AUTO, worker_resources={"memory": memory_for_four})
    assert (original.config.batch_size, original.config.gradient_accumulation_steps) == (4, 4)
    commit_plan(original)

    more_memory = AUTO | {"worker_resources": {"memory": "8GB"}}
    resumed = dry_run(files, "kept", **more_memory)
    assert batch_of(resumed) == (4, 4)
    assert resumed["resumes_from"]
    assert batch_of(dry_run(files, "longer", resume_from_checkpoint="run:kept", **more_memory)) == (4, 4)
    assert batch_of(dry_run(files, "new", **more_memory)) == (16, 1)


def test_workers_that_share_sequences_count_as_one(files: Path):
    """40 rows are 5 steps of 2 x 4 rows, and 10 steps of 4 rows that two workers share; each has half the activations of a row."""
    keys = {"num_devices": 2, "train_batch_size_per_device": 4, "num_epochs": 1}
    keys |= {"context_length": 128, "padding": "max_length"}
    alone = dry_run(files, "alone", **keys)
    shared = dry_run(files, "shared", **keys, sequence_parallel_size=2)
    assert (alone["steps"], shared["steps"]) == (5, 10)
    assert shared["parallelism"] == "DDP, each sequence on 2 workers"
    assert shared["batch"] == "4 rows per 2 devices, 1 accumulated"
    logits = [plan["memory"]["estimate"]["logits"] for plan in (alone, shared)]
    assert logits[1] == logits[0] / 2


def batch_of(plan: dict[str, Any]) -> tuple[int, ...]:
    """Return (rows per device, accumulated batches) as the plan prints them."""
    return tuple(int(figure) for figure in re.findall(r"\d+", plan["batch"])[:2])


@pytest.mark.parametrize(
    "keys", [{}, {"context_length": 61}, {"padding": "max_length", "context_length": 61}]
)
def test_context_length_of_the_model_includes_batch_padding(files: Path, keys: dict[str, Any]):
    """If a batch is longer than the context length of the model, Unsloth truncates the tokens but not the labels."""
    plan = plan_of(files, "padded", long_rows="truncate", **keys, **ON_A10G)
    train = fetch_prepared(plan.train, plan.cache, plan.prepared)
    multiple = pad_to_multiple_of(plan.config, "cuda", train.summary.longest)
    collate = collate_rows(0, multiple, packed=False, attention=Attention("unsloth", mask=True))
    rows = train.dataset()
    longest_batch = max(collate([rows[row]])["input_ids"].shape[1] for row in range(len(rows)))
    assert longest_batch == model_request(plan, files / "model", None, train, None).context_length


def test_auto_batch_size_fits_the_requested_accelerator(files: Path):
    plan = dry_run(files, "a10g", **AUTO, **ON_A10G)
    assert batch_of(plan) == (16, 1)
    assert_names(plan["batch"], "auto", "A10G")
    assert plan["sequences_per_step"] == 16
    assert plan["memory"]["verdict"] == "fits"


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({}, "CPU"),
        (
            {"device": "cuda", "worker_resources": {"accelerator_type:Intel-GAUDI": 0.001}},
            "Intel-GAUDI",
        ),
    ],
)
def test_auto_batch_size_without_known_memory_is_an_error(changes: dict[str, Any], fact: str, files: Path):
    settings = tiny_settings(files) | AUTO | changes
    finished = run_main_quickly(write_yaml(files / "unknown.yaml", settings), "--dry-run")
    assert finished.exit_code == 2
    assert_names(finished.errors, "train_batch_size_per_device: auto: ", "memory", fact)
    assert "Traceback" not in finished.errors
