"""Tests that ten steps have the same losses on one worker, with DDP, ZeRO-1, 2 and 3, shared sequences, and Unsloth's CPU mode.

Packed runs take as many packs per step, and their eval loss equals that of unpacked runs. `make test` runs a sample,
`make test-kernels` all of it (ALL_KERNELS=1).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig

from tests.support.faults import gpu_kernel_variables
from tests.support.grids import only_in_test_kernels
from tests.support.jobs import PROJECT, read_metrics, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data, write_preference_pairs
from training.models import kernels
from training.models.kernels import Method

# Each trains on eight rows per step; the eval batch sizes differ on purpose.
SPREADS: dict[str, dict[str, Any]] = {
    "one": {"num_devices": 1, "train_batch_size_per_device": 8, "eval_batch_size_per_device": 4},
    "ddp": {
        "num_devices": 2,
        "train_batch_size_per_device": 2,
        "gradient_accumulation_steps": 2,
        "eval_batch_size_per_device": 3,
    },
    "zero_1": {"num_devices": 2, "train_batch_size_per_device": 4, "deepspeed": "zero_1"},
    "zero_2": {
        "num_devices": 2,
        "train_batch_size_per_device": 2,
        "gradient_accumulation_steps": 2,
        "eval_batch_size_per_device": 1,
        "deepspeed": "zero_2",
    },
    "zero_3": {
        "num_devices": 2,
        "train_batch_size_per_device": 4,
        "eval_batch_size_per_device": 1,  # of 11 rows: the last batch of one worker contains only padding
        "deepspeed": "zero_3",
    },
    "sequence_parallel": {
        "num_devices": 2,
        "sequence_parallel_size": 2,
        "train_batch_size_per_device": 4,
        "gradient_accumulation_steps": 2,
        "eval_batch_size_per_device": 3,
    },
    "unsloth_one": {"num_devices": 1, "train_batch_size_per_device": 8, "kernels": "unsloth"},
    "unsloth_ddp": {"num_devices": 2, "train_batch_size_per_device": 4, "kernels": "unsloth"},
    "unsloth_zero_1": {
        "num_devices": 2,
        "train_batch_size_per_device": 4,
        "kernels": "unsloth",
        "deepspeed": "zero_1",
    },
    "unsloth_zero_2": {
        "num_devices": 2,
        "train_batch_size_per_device": 2,
        "gradient_accumulation_steps": 2,
        "kernels": "unsloth",
        "deepspeed": "zero_2",
    },
}
PAIRS: dict[str, Any] = {
    "task": "preference_tuning",
    "train_path": "train-pairs.jsonl",
    "valid_path": "valid-pairs.jsonl",
    "learning_rate": 1e-3,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 4}},
    "full": {},
    "qlora": {"lora_config": {"r": 4}, "load_in_4bit": True},
    "packed": {"lora_config": {"r": 4}, "packing": True, "context_length": 180},
    "dpo_lora": {"lora_config": {"r": 4}} | PAIRS,
    "dpo_full": PAIRS,
}
ALL = [(method, spread) for method in ("lora", "full") for spread in SPREADS if spread != "one"] + [
    *(("qlora", spread) for spread in SPREADS if spread not in ("one", "zero_3")),
    ("packed", "ddp"),
    ("dpo_lora", "ddp"),
    ("dpo_lora", "zero_3"),
    ("dpo_full", "zero_3"),
]
SAMPLE = [
    ("lora", "ddp"),
    ("lora", "unsloth_ddp"),
    ("full", "zero_3"),
]
FAST = SAMPLE[0]
CELLS = ALL if os.environ.get("ALL_KERNELS") else SAMPLE
ALL_GPU_KERNEL_CELLS = [
    ("full", "zero_3", "torch"),
    ("full", "zero_3", "liger"),
    ("lora", "zero_3", "torch"),
    ("packed", "ddp", "torch"),
    ("dpo_full", "zero_3", "torch"),
]
GPU_KERNEL_CELLS = ALL_GPU_KERNEL_CELLS if os.environ.get("ALL_KERNELS") else []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loss_equality")
    make_model(directory / "model")
    # 76 rows are 9.5 steps an epoch: the last step of the first epoch is a short one.
    write_data(directory, train_rows=76, valid_rows=11)
    write_preference_pairs(directory, train_rows=76, valid_rows=11)
    zero_3 = json.loads((PROJECT / "configs/deepspeed/zero_3.json").read_text("utf-8"))
    # The preset would not partition the parameters of a model this small.
    zero_3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (directory / "partition_everything.json").write_text(json.dumps(zero_3), "utf-8")
    return directory


def train(
    files: Path, name: str, settings: dict[str, Any], variables: dict[str, str] | None = None
) -> tuple[list[float], list[float]]:
    """Train for ten steps; return (loss of each step, eval losses)."""
    config = tiny_settings(files) | {
        "run_name": name,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    }
    config |= settings
    config |= {key: str(files / config[key]) for key in ("train_path", "valid_path")}
    if config.get("deepspeed") == "zero_3":
        config["deepspeed"] = {"config_path": str(files / "partition_everything.json")}
    finished = run_main(
        write_yaml(files / f"{name}.yaml", config),
        "--json",
        variables=variables,
        timeout=900 if variables else 300,  # interpreted kernels take minutes
    )
    assert finished.exit_code == 0, finished.errors
    metrics = read_metrics(files / "runs" / name)
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    assert len(losses) == 10
    assert len(eval_losses) == 3
    return losses, eval_losses


class References:
    """The losses of each method on one worker, trained on first access."""

    def __init__(self, files: Path):
        self._files = files
        self._losses: dict[str, tuple[list[float], list[float]]] = {}

    def __getitem__(self, method: str) -> tuple[list[float], list[float]]:
        if method not in self._losses:
            self._losses[method] = train(self._files, f"{method}-one", METHODS[method] | SPREADS["one"])
        return self._losses[method]


@pytest.fixture(scope="module")
def on_one_worker(files: Path) -> References:
    return References(files)


def test_compatibility_table_marks_exactly_the_tested_cells():
    """These are the cells of `make test-kernels` and the runs on one worker that they are compared with."""
    methods: dict[str, Method] = {"lora": "LoRA", "full": "full", "qlora": "QLoRA"}
    names = ("one", "ddp", "zero_1", "zero_2", "zero_3", "sequence_parallel")
    spreads: dict[str, str] = dict(zip(names, kernels.SPREADS, strict=True))
    cells = [(methods[method], spread) for method, spread in ALL if method in methods]
    cells += [(method, "one") for method in methods.values()]
    marked = {
        (provider, method, spread)
        for (provider, device), rows in kernels.COMPATIBILITY.items()
        for method, row in rows.items()
        for spread, cell in zip(kernels.SPREADS, row, strict=True)
        if device == "cpu" and cell == kernels.TESTED
    }
    assert marked == {
        (
            "unsloth" if spread.startswith("unsloth_") else "torch",
            method,
            spreads[spread.removeprefix("unsloth_")],
        )
        for method, spread in cells
    }


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method == FAST[0] else pytest.mark.slow)
        for method in dict.fromkeys(method for method, _ in CELLS)
    ],
)
def test_training_lowers_the_losses(method: str, on_one_worker: References):
    """Otherwise the comparisons below would also hold for a trainer that does nothing."""
    losses, eval_losses = on_one_worker[method]
    assert losses[0] - losses[-1] > 0.05
    assert eval_losses[0] - eval_losses[-1] > 0.05


@pytest.mark.parametrize(
    ("method", "spread"),
    [pytest.param(*cell, marks=[] if cell == FAST else pytest.mark.slow) for cell in CELLS],
)
def test_losses_equal_those_of_one_worker(method: str, spread: str, files: Path, on_one_worker: References):
    losses, eval_losses = train(files, f"{method}-{spread}", METHODS[method] | SPREADS[spread])
    assert losses == pytest.approx(on_one_worker[method][0], abs=1e-4)
    assert eval_losses == pytest.approx(on_one_worker[method][1], abs=1e-5)
    if not method.startswith("dpo") and not spread.startswith("unsloth"):
        assert accuracies(files, f"{method}-{spread}") == accuracies(files, f"{method}-one")


def accuracies(files: Path, name: str) -> list[float]:
    """Return the token accuracies of a run with its starting weights: of the first evaluation and of the first step."""
    evaluation, step, *_ = read_metrics(files / "runs" / name)
    return [evaluation["eval_mean_token_accuracy"], step["mean_token_accuracy"]]


@pytest.mark.slow
@only_in_test_kernels
def test_losses_of_a_mixture_with_its_router_loss_equal_those_of_one_worker(files: Path):
    """The load-balancing loss is a mean over micro-batches, which have one row here on both sides."""
    mixture = make_model(
        files / "mixture",
        kind=MixtralConfig,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    settings = {"model_id": str(mixture), "train_batch_size_per_device": 1}
    one = train(files, "mixture-one", settings | {"num_devices": 1, "gradient_accumulation_steps": 8})
    ddp = train(files, "mixture-ddp", settings | {"num_devices": 2, "gradient_accumulation_steps": 4})
    assert one[0][0] > one[1][0] + 1, "the load-balancing loss of two experts per token is about 2"
    assert ddp[0][0] == pytest.approx(one[0][0], abs=1e-5)
    assert ddp[0] == pytest.approx(one[0], abs=1e-4)
    assert ddp[1] == pytest.approx(one[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "spread", "provider"), GPU_KERNEL_CELLS)
def test_losses_with_gpu_kernels_equal_those_of_one_worker(
    method: str, spread: str, provider: str, files: Path, on_one_worker: References
):
    """TRL's fused head reads the weights directly, although ZeRO-3 has partitioned them."""
    name = f"{method}-{spread}-as-gpus-{provider}"
    losses, eval_losses = train(
        files, name, METHODS[method] | SPREADS[spread], gpu_kernel_variables(provider)
    )
    figures = {figure for entry in read_metrics(files / "runs" / name) for figure in entry}
    # TRL's fused head reports the entropy for rows, not for pairs.
    of_predictions = {"entropy", "mean_token_accuracy", "eval_mean_token_accuracy"}
    assert of_predictions & figures == (set() if method.startswith("dpo") else of_predictions)
    assert "num_tokens" not in figures
    assert losses == pytest.approx(on_one_worker[method][0], abs=1e-4)
    assert eval_losses == pytest.approx(on_one_worker[method][1], abs=1e-5)


@pytest.mark.slow
def test_packing_does_not_change_the_eval_loss(on_one_worker: References):
    """The losses before the first step are compared, when both runs have the same weights."""
    assert on_one_worker["packed"][1][0] == pytest.approx(on_one_worker["lora"][1][0], abs=1e-6)
