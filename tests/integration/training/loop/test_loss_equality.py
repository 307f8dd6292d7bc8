"""The same ten steps are the same ten losses: on one worker, with DDP, ZeRO-1, 2 and 3, and with Unsloth's CPU mode.

Packed, too, where a step takes as many packs; and an evaluation does not depend on whether its rows are packed. `make test` takes a
sample, `make test-kernels` all of it (ALL_KERNELS=1).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import kernels_of_gpus
from tests.support.jobs import PROJECT, read_metrics, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data, write_pairs_of
from training.models import kernels
from training.models.kernels import Method

# Eight rows a step in every one; the batch sizes of evaluation differ on purpose.
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
        "eval_batch_size_per_device": 1,  # of 11 rows: the last batch of a worker holds padding alone
        "deepspeed": "zero_3",
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
    ("packed", "ddp"),
    ("dpo_lora", "zero_3"),
]
FAST = SAMPLE[0]
CELLS = ALL if os.environ.get("ALL_KERNELS") else SAMPLE
ALL_OF_GPUS = [
    ("full", "zero_3", "torch"),
    ("full", "zero_3", "liger"),
    ("lora", "zero_3", "torch"),
    ("packed", "ddp", "torch"),
    ("dpo_full", "zero_3", "torch"),
]
OF_GPUS = ALL_OF_GPUS[: None if os.environ.get("ALL_KERNELS") else 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loss_equality")
    make_model(directory / "model")
    # 76 rows are 9.5 steps an epoch: the last step of the first epoch is a short one.
    write_data(directory, train_rows=76, valid_rows=11)
    write_pairs_of(directory, train_rows=76, valid_rows=11)
    zero_3 = json.loads((PROJECT / "configs/deepspeed/zero_3.json").read_text("utf-8"))
    # The preset would leave every parameter of a model this small whole on each worker.
    zero_3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (directory / "splits_everything.json").write_text(json.dumps(zero_3), "utf-8")
    return directory


def train(
    files: Path, name: str, settings: dict[str, Any], variables: dict[str, str] | None = None
) -> tuple[list[float], list[float]]:
    """(loss of each step, eval losses)."""
    config = tiny_settings(files) | {
        "run_name": name,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    }
    config |= settings
    config |= {key: str(files / config[key]) for key in ("train_path", "valid_path")}
    if config.get("deepspeed") == "zero_3":
        config["deepspeed"] = {"config_path": str(files / "splits_everything.json")}
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
    """Each method's run on one worker, made once."""

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


def test_the_table_says_tested_of_what_is_tested_here():
    """Each cell of `make test-kernels`, and the runs that they are compared with."""
    methods: dict[str, Method] = {"lora": "LoRA", "full": "full", "qlora": "QLoRA"}
    spreads: dict[str, str] = dict(
        zip(("one", "ddp", "zero_1", "zero_2", "zero_3"), kernels.SPREADS, strict=True)
    )
    cells = [(methods[method], spread) for method, spread in ALL if method in methods]
    cells += [(method, "one") for method in methods.values()]
    said = {
        (provider, method, spread)
        for (provider, device), of_method in kernels.COMPATIBILITY.items()
        for method, row in of_method.items()
        for spread, cell in zip(kernels.SPREADS, row, strict=True)
        if device == "cpu" and cell == kernels.TESTED
    }
    assert said == {
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
def test_training_changes_the_losses(method: str, on_one_worker: References):
    """Else the comparisons below would hold for a trainer that does nothing."""
    losses, eval_losses = on_one_worker[method]
    assert losses[0] - losses[-1] > 0.05
    assert eval_losses[0] - eval_losses[-1] > 0.05


@pytest.mark.parametrize(
    ("method", "spread"),
    [pytest.param(*cell, marks=[] if cell == FAST else pytest.mark.slow) for cell in CELLS],
)
def test_losses_are_equal(method: str, spread: str, files: Path, on_one_worker: References):
    losses, eval_losses = train(files, f"{method}-{spread}", METHODS[method] | SPREADS[spread])
    assert losses == pytest.approx(on_one_worker[method][0], abs=1e-4)
    assert eval_losses == pytest.approx(on_one_worker[method][1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "spread", "provider"), OF_GPUS)
def test_losses_are_equal_with_the_kernels_that_gpus_have(
    method: str, spread: str, provider: str, files: Path, on_one_worker: References
):
    """TRL's fused head looks at weights by itself that ZeRO-3 has split."""
    name = f"{method}-{spread}-as-gpus-{provider}"
    losses, eval_losses = train(files, name, METHODS[method] | SPREADS[spread], kernels_of_gpus(provider))
    figures = {figure for entry in read_metrics(files / "runs" / name) for figure in entry}
    assert ("entropy" in figures) == (not method.startswith("dpo"))  # the head's own, of rows
    assert "num_tokens" not in figures
    assert losses == pytest.approx(on_one_worker[method][0], abs=1e-4)
    assert eval_losses == pytest.approx(on_one_worker[method][1], abs=1e-5)


@pytest.mark.slow
def test_packing_leaves_the_eval_loss(on_one_worker: References):
    """Before the first step, when both are the same model."""
    assert on_one_worker["packed"][1][0] == pytest.approx(on_one_worker["lora"][1][0], abs=1e-6)
