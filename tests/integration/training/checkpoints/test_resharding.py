"""Checkpoints of DeepSpeed runs resume on another number of workers with the rows, losses and states of an undisturbed run.

The first tests convert the checkpoints of DeepSpeed engines, the last one trains complete runs. `make test` runs a sample,
`make test-resume` all of them (RESUME_GRID=1).
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs.reading import read_metrics
from tests.support.faults import injection, read_ledger
from tests.support.jobs import CompletedCommand, started, write_yaml
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_model, write_data
from tests.support.zero_engines import STATES, Job, Outcome, run_jobs
from utils.storage.bucket import join_uri, open_store, sync_to_node
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = pytest.mark.timeout(900)

IS_GRID = bool(os.environ.get("RESUME_GRID"))
CHANGES = ((2, 1), (1, 2), (2, 4), (4, 2))
FAST = Job(stage=3, workers=1, saved_by=2)
"""The only job that is not marked slow. Under ZeRO-3, this number of workers also changes the sub-groups."""
SAMPLE = [FAST, Job(1, 2, 1), Job(2, 1, 2), Job(3, 4, 2), Job(2, 1, 2, bf16=True)]
GRID = [
    Job(stage, workers, saved_by, bf16=bf16)
    for bf16, stage, (saved_by, workers) in product((False, True), (1, 2, 3), CHANGES)
]
SABOTAGED = [Job(2, 1, 2, state) for state in STATES]
FAULTS = {
    "missing": "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing",
    "truncated": "zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read",
    "pickled": "Weights only load failed",
}
DAMAGED = [Job(2, 1, 2, fault) for fault in FAULTS]


def saving(job: Job) -> Job:
    """Return the job that saves the checkpoint of another."""
    assert job.saved_by is not None
    return Job(job.stage, job.saved_by, bf16=job.bf16)


class Engines:
    """The outcomes of jobs, which one process trains together."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._outcomes: dict[Job, Outcome] = {}

    def train(self, jobs: list[Job]) -> None:
        """Train jobs after those that save their checkpoints."""
        first = dict.fromkeys(saving(job) for job in jobs)
        missing = [job for job in (*first, *jobs) if job not in self._outcomes]
        if missing:
            self._outcomes |= run_jobs(self.directory, missing)

    def __getitem__(self, job: Job) -> Outcome:
        return self._outcomes[job]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def all_engines(engines: Engines) -> Engines:
    """Train everything that the slow tests need at once."""
    engines.train([*(GRID if IS_GRID else SAMPLE), *SABOTAGED, *DAMAGED])
    return engines


def check_same(outcome: Outcome, undisturbed: Outcome, *, bf16: bool = False) -> None:
    """Check that a resumed engine has the states of the checkpoint bit for bit, and then takes the same steps up to rounding."""
    assert outcome.problem == ""
    assert outcome.restored.keys() == undisturbed.restored.keys()
    for name, state in undisturbed.restored.items():
        assert torch.equal(outcome.restored[name], state), name
    assert outcome.losses == pytest.approx(undisturbed.losses, abs=1e-2 if bf16 else 1e-6)
    for name, state in undisturbed.final.items():
        torch.testing.assert_close(outcome.final[name], state, rtol=0, atol=1e-3 if bf16 else 1e-6, msg=name)


@pytest.mark.slow
def test_engine_resumes_on_one_worker_from_the_checkpoint_of_two(engines: Engines):
    engines.train([FAST])
    check_same(engines[FAST], engines[saving(FAST)])


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in (GRID if IS_GRID else SAMPLE) if job != FAST], ids=str)
def test_engine_resumes_on_another_number_of_workers(job: Job, all_engines: Engines):
    check_same(all_engines[job], all_engines[saving(job)], bf16=job.bf16)


@pytest.mark.slow
@pytest.mark.parametrize("job", SABOTAGED, ids=lambda job: job.fault)
def test_comparison_detects_a_state_that_is_not_converted(job: Job, all_engines: Engines):
    with pytest.raises(AssertionError, match=job.fault):
        check_same(all_engines[job], all_engines[saving(job)])


@pytest.mark.slow
@pytest.mark.parametrize("job", DAMAGED, ids=lambda job: job.fault)
def test_damaged_shard_is_named_and_nothing_is_converted(job: Job, all_engines: Engines):
    problem = all_engines[job].problem
    assert FAULTS[job.fault] in problem
    directory = all_engines.directory / job.outcome_file.removesuffix(".pt")
    assert "resharded" not in {path.name for path in directory.iterdir()}
    assert not list(directory.rglob("canary"))
    if job.fault != "pickled":  # the worker names the checkpoint in the error for pickles
        assert problem.startswith(
            "s3://bucket/run/checkpoints/step-000004, which 2 workers saved, cannot be converted for 1"
        )
        assert "num_devices: 2" in problem


METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_config": {"r": 4}}}
RUNS = [("lora", 3, 2, 1)] + (
    [
        cell
        for cell in (
            *((method, stage, *change) for method, stage, change in product(METHODS, (1, 2, 3), CHANGES[:2])),
            ("lora", 2, 2, 4),
            ("full", 3, 4, 2),
        )
        if cell != ("lora", 3, 2, 1)
    ]
    if IS_GRID
    else []
)
STEPS, RESUMED_AT, ROWS_PER_STEP = 8, 4, 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resharding")
    make_model(directory / "model")
    write_data(directory, train_rows=44, valid_rows=3)
    return directory


@pytest.fixture(scope="module")
def storage(bucket: EmbeddedBucket) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield set_up_own_bucket(patch, bucket, "resharding")


class Runs:
    """The complete runs of this module, each trained once."""

    def __init__(self, files: Path, storage: str):
        self.files = files
        self.storage = storage
        self._trained: set[str] = set()

    def train(self, name: str, method: str, stage: int, workers: int, **more: Any) -> CompletedCommand:
        """Train a run to the end, and record the rows of its steps."""
        config = {
            "model_id": str(self.files / "model"),
            "train_path": str(self.files / "train.jsonl"),
            "valid_path": str(self.files / "valid.jsonl"),
            "storage_path": self.storage,
            "output_dir": str(self.files / "scratch"),
            "run_name": name,
            "device": "cpu",
            "dtype": "fp32",
            "deepspeed": f"zero_{stage}",
            "num_devices": workers,
            "train_batch_size_per_device": ROWS_PER_STEP // workers,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "optim": "adamw_torch",
            "gradient_checkpointing": False,
            "max_failures": 0,
            "num_checkpoints_to_keep": 9,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": RESUMED_AT},
        }
        path = write_yaml(self.files / f"{name}.yaml", config | METHODS[method] | more)
        with started(path, injection(self.files / f"rows-{name}")) as job:
            finished = job.end()
        assert finished.exit_code == 0, finished.errors
        return finished

    def undisturbed(self, method: str, stage: int, workers: int) -> str:
        """Return the name of a run that trains without a restart."""
        name = f"{method}-zero-{stage}-on-{workers}"
        if name not in self._trained:
            self._trained.add(name)
            self.train(name, method, stage, workers)
        return name

    def losses(self, name: str) -> list[float]:
        """Return the losses of all steps."""
        metrics = read_metrics(open_store(join_uri(self.storage, name)))
        return [line.loss for line in metrics if line.loss is not None]

    def rows(self, name: str) -> dict[int, list[int]]:
        """Return step -> its rows, for the steps after the checkpoint."""
        rows = defaultdict[int, list[int]](list)
        for consumed in sorted(read_ledger(self.files / f"rows-{name}")):
            if consumed.step > RESUMED_AT:
                rows[consumed.step].append(consumed.row)
        return {step: sorted(of_step) for step, of_step in rows.items()}

    def last(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the weights and the optimizer states in the last checkpoint."""
        uri = join_uri(self.storage, name, "checkpoints", f"step-{STEPS:06d}")
        directory = sync_to_node(uri, self.files / "last" / name)
        (weights,) = directory.glob("*model.safetensors")
        return load_file(weights), optimizer_states(directory / f"global_step{STEPS}")


def optimizer_states(directory: Path) -> dict[str, torch.Tensor]:
    """Return the complete optimizer states, assembled without the code under test; see `zero_engines` for their names."""
    # Loading DeepSpeed's own objects is safe, because this test wrote the files.
    shards = [
        torch.load(path, weights_only=False)["optimizer_state_dict"]
        for path in sorted(directory.glob("*_optim_states.pt"))
    ]
    states: dict[str, torch.Tensor] = {}
    if "param_slice_mappings" in shards[0]:
        for number, saved in shards[0]["base_optimizer_state"]["state"].items():
            entries = sum(shard["single_partition_of_fp32_groups"][number].numel() for shard in shards)
            for name in STATES:
                parts = [shard["base_optimizer_state"]["state"][number][name] for shard in shards]
                states[f"group {number}/{name}"] = torch.cat(parts)[:entries]
            states[f"group {number}/step"] = saved["step"]
        return states
    shapes = torch.load(directory / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)[
        "param_shapes"
    ]
    for number, group in enumerate(shapes):
        offset = 0
        for parameter, shape in group.items():
            part = -(-shape.numel() // len(shards))
            for name in STATES:
                flats = [shard["optimizer_state_dict"]["state"][number][name] for shard in shards]
                whole = torch.cat([flat[offset : offset + part] for flat in flats])
                states[f"{parameter}/{name}"] = whole[: shape.numel()]
            offset += part
    return states


@pytest.fixture(scope="module")
def runs(files: Path, storage: str) -> Runs:
    return Runs(files, storage)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage", "saved_by", "workers"), RUNS)
def test_deepspeed_run_resumes_on_another_number_of_workers(
    method: str, stage: int, saved_by: int, workers: int, runs: Runs
):
    """Every step has the rows and the loss of an undisturbed run, and the last checkpoint its weights and optimizer states."""
    undisturbed = runs.undisturbed(method, stage, saved_by)
    name = f"{undisturbed}-then-{workers}"
    start = join_uri(runs.storage, undisturbed, "checkpoints", f"step-{RESUMED_AT:06d}")
    finished = runs.train(name, method, stage, workers, resume_from_checkpoint=start)
    assert f"converting the checkpoint, which {saved_by} workers saved, for {workers}" in finished.errors
    assert runs.rows(name) == runs.rows(undisturbed)
    assert list(runs.rows(name)) == list(range(RESUMED_AT + 1, STEPS + 1))
    assert len(runs.losses(name)) == STEPS
    assert runs.losses(name) == pytest.approx(runs.losses(undisturbed), abs=1e-4)
    for found, expected, tolerance in zip(runs.last(name), runs.last(undisturbed), (1e-5, 1e-6), strict=True):
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, rtol=0, atol=tolerance, msg=part)
    manifest = json.loads(
        open_store(join_uri(runs.storage, name)).read(f"checkpoints/step-{STEPS:06d}/MANIFEST.json")
    )
    assert manifest["world_size"] == workers
