"""Workers that share sequences compute what one worker computes, with a part of its memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.jobs import PROJECT, read_metrics, run_main, tiny_settings, write_yaml
from tests.support.sequence_workers import Outcome, run_workers
from tests.support.tiny_model import make_model, write_data
from training.data import batches
from training.data.row_index import IGNORED
from training.models import sequence_parallel
from training.models.attention import SEQUENCE_PARALLEL

# Two and three workers divide none of these lengths, so that sequences get padding.
ROWS = [[37], [23], [11], [41]]
PACKS = [[17, 5, 9], [13, 20], [7, 7, 7], [35]]
LONG = 8192


def assert_equal(outcome: Outcome, reference: Outcome) -> None:
    """Assert that losses differ by at most 1e-5, and gradients by at most 1e-4 of the largest value of their parameter."""
    assert outcome.loss == pytest.approx(reference.loss, abs=1e-5)
    assert outcome.gradients.keys() == reference.gradients.keys()
    assert differing(outcome, reference) == []


def differing(outcome: Outcome, reference: Outcome) -> list[str]:
    """Return the parameters whose gradients differ by more than 1e-4 of their largest value."""
    return [
        name
        for name, gradient in reference.gradients.items()
        if (outcome.gradients[name] - gradient).abs().max() > 1e-4 * gradient.abs().max()
    ]


@pytest.fixture(scope="module")
def references(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    directory = tmp_path_factory.mktemp("references")
    return {
        name: run_workers(directory, tiny_model, lengths, workers=1)
        for name, lengths in (("rows", ROWS), ("packs", PACKS))
    }


@pytest.mark.parametrize(
    ("lengths", "workers", "size"),
    [
        ("rows", 2, 2),
        ("packs", 2, 2),
        pytest.param("rows", 4, 2, marks=pytest.mark.slow),
        pytest.param("packs", 4, 2, marks=pytest.mark.slow),
        pytest.param(
            "packs", 4, 4, marks=pytest.mark.slow
        ),  # of two key-value heads, each goes to two workers
    ],
)
def test_workers_that_share_sequences_have_the_loss_and_gradients_of_one_worker(
    lengths: str, workers: int, size: int, tiny_model: Path, tmp_path: Path, references: dict[str, Outcome]
):
    rows = ROWS if lengths == "rows" else PACKS
    outcome = run_workers(tmp_path, tiny_model, rows, workers=workers, size=size)
    assert_equal(outcome, references[lengths])


@pytest.mark.slow
def test_workers_that_share_packed_sequences_can_use_the_kernels_for_gpus(
    tiny_model: Path, tmp_path: Path, references: dict[str, Outcome]
):
    outcome = run_workers(tmp_path, tiny_model, PACKS, workers=2, size=2, attention="torch_varlen")
    assert_equal(outcome, references["packs"])


def _shift_within_parts() -> None:
    """Shift the labels of each part alone, so that the last token of a part has no label."""

    def part(
        collate: Callable[[Any], dict[str, Any]], size: int, rank: int
    ) -> Callable[[Any], dict[str, Any]]:
        def collate_part(examples: Any) -> dict[str, Any]:
            batch = complete(collate, size, rank)(examples)
            labels = collate(examples)["labels"].chunk(size, 1)[rank]
            shifted = pad(labels[:, 1:], (0, 1), value=IGNORED)
            return batch | {"labels": shifted, "shift_labels": shifted}

        return collate_part

    from tests.support import sequence_workers

    complete = batches.part_of_sequences
    sequence_workers.part_of_sequences = part


def _attend_to_own_part() -> None:
    """Leave tokens and heads where they are."""
    sequence_parallel._exchange = lambda states, divided, joined, group: states


def _lose_boundaries() -> None:
    """Attend across packed rows."""
    attend = sequence_parallel.causal_attention
    sequence_parallel.causal_attention = lambda *states, cu_seq_lens_q, **arguments: attend(
        *states, **arguments
    )


@pytest.mark.slow
@pytest.mark.parametrize("change", [_shift_within_parts, _attend_to_own_part, _lose_boundaries])
def test_comparison_detects_errors(
    change: Callable[[], None], tiny_model: Path, tmp_path: Path, references: dict[str, Outcome]
):
    lengths = [[sum(rows)] for rows in PACKS] if change is _attend_to_own_part else PACKS
    reference = run_workers(tmp_path, tiny_model, lengths, workers=1)
    outcome = run_workers(tmp_path, tiny_model, lengths, workers=2, size=2, change=change)
    assert abs(outcome.loss - reference.loss) > 1e-4
    assert differing(outcome, reference)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(SEQUENCE_PARALLEL))
def test_workers_can_share_the_sequences_of_each_architecture(architecture: str, tmp_path: Path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,  # some architectures alternate between kinds of layers
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for lengths in (ROWS, PACKS):
        reference = run_workers(tmp_path, tmp_path / "model", lengths, workers=1)
        assert_equal(run_workers(tmp_path, tmp_path / "model", lengths, workers=2, size=2), reference)


@pytest.mark.slow
def test_two_workers_save_half_the_activations_of_a_long_sequence(tmp_path: Path):
    model = make_model(tmp_path / "model", layers=4, positions=LONG)
    for lengths in ([[LONG]], [[LONG // 2, LONG // 4, LONG // 4]]):
        one = run_workers(tmp_path, model, lengths, workers=1, backward=False)
        two = run_workers(tmp_path, model, lengths, workers=2, size=2, backward=False)
        assert two.loss == pytest.approx(one.loss, abs=1e-5)
        assert two.saved <= 0.6 * one.saved


# --- Complete runs ----------------------------------------------------------------------------------------------

RATE = 10.0  # one step of SGD: large enough that the change of a weight is not lost to rounding
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 4}},
    "full": {},
    "packed_lora": {"lora_config": {"r": 4}, "packing": True, "context_length": 181},
    "packed_full": {"packing": True, "context_length": 181},
}
SHARED = {"num_devices": 2, "sequence_parallel_size": 2, "train_batch_size_per_device": 8}
SPREADS: dict[str, dict[str, Any]] = {
    "one": {"train_batch_size_per_device": 8},
    "ddp": SHARED | {"eval_batch_size_per_device": 3},
    "zero_3": SHARED | {"deepspeed": "zero_3"},
    "accumulated": SHARED | {"train_batch_size_per_device": 2, "gradient_accumulation_steps": 4},
    "two_by_two": SHARED | {"num_devices": 4, "train_batch_size_per_device": 4, "deepspeed": "zero_2"},
}

SAMPLE = [("packed_lora", "ddp")]
ALL_RUNS = [
    *SAMPLE,
    ("full", "two_by_two"),
    ("lora", "ddp"),
    ("lora", "zero_3"),
    ("full", "accumulated"),
    ("packed_full", "zero_3"),
]
"""`make test-kernels` runs all of them (ALL_KERNELS=1), `make test-all` the sample."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sequence_parallel")
    make_model(directory / "model")
    write_data(directory, train_rows=40, valid_rows=11)
    zero_3 = json.loads((PROJECT / "configs/deepspeed/zero_3.json").read_text("utf-8"))
    # The preset would not partition the parameters of a model this small.
    zero_3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (directory / "partition_everything.json").write_text(json.dumps(zero_3), "utf-8")
    return directory


class Runs:
    """Runs of one step, trained on first access."""

    def __init__(self, files: Path):
        self._files = files
        self._runs: dict[tuple[str, str], tuple[list[dict[str, Any]], dict[str, torch.Tensor]]] = {}

    def __getitem__(self, run: tuple[str, str]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """Return the metrics of a method and spread, and the gradient of each trained tensor: its change by a step of SGD."""
        if run not in self._runs:
            self._runs[run] = self._train(*run)
        return self._runs[run]

    def _train(self, method: str, spread: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        name = f"{method}-{spread}"
        settings = {
            "run_name": name,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "gradient_checkpointing": spread == "ddp",
        }
        config = tiny_settings(self._files) | settings | METHODS[method] | SPREADS[spread]
        if config.get("deepspeed") == "zero_3":
            config["deepspeed"] = {"config_path": str(self._files / "partition_everything.json")}
        finished = run_main(write_yaml(self._files / f"{name}.yaml", config), "--json")
        assert finished.exit_code == 0, finished.errors
        checkpoint = Path(finished.result["last_checkpoint"])
        metrics = read_metrics(self._files / "runs" / name)
        if "lora_config" in METHODS[method]:
            after = load_file(checkpoint / "adapter_model.safetensors")
            # The matrices B start at 0, so the first gradient of A is 0.
            return metrics, {name: tensor / RATE for name, tensor in after.items() if "lora_B" in name}
        before, after = (
            load_file(path / "model.safetensors") for path in (self._files / "model", checkpoint)
        )
        return metrics, {name: (tensor - before[name]) / RATE for name, tensor in after.items()}


@pytest.fixture(scope="module")
def runs(files: Path) -> Runs:
    return Runs(files)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "spread"), ALL_RUNS if os.environ.get("ALL_KERNELS") else SAMPLE)
def test_run_on_workers_that_share_sequences_has_the_losses_and_gradients_of_one_worker(
    method: str, spread: str, runs: Runs
):
    (expected, reference), (metrics, gradients) = runs[method, "one"], runs[method, spread]
    for name in ("loss", "eval_loss"):  # before the step, whose rate would multiply rounding
        first, reference_first = (
            next(line[name] for line in run if name in line) for run in (metrics, expected)
        )
        assert first == pytest.approx(reference_first, abs=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert gradient.any()
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
