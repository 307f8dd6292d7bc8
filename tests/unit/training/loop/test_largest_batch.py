"""A run of the largest batch after the first step, which must not change the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tests.support.trainers import cpu_arguments, make_trainer
from training.data.batches import BatchPlan, BatchShape, PairSequences, TokenSequences
from training.loop.callbacks import AfterFirstStep
from training.loop.preference import collate_pairs
from training.loop.trainers import TrainingRows, collate_rows
from training.models.attention import Attention

ROWS, STEPS, LONGEST = 8, 3, 5


def ids(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, 500, (length,), generator=generator).tolist()


def rows_of(task: str, pad: int) -> TrainingRows:
    generator = torch.Generator().manual_seed(0)
    plan = BatchPlan(BatchShape(ROWS, 2, 1, 2), 0)
    lengths = [40 if row == LONGEST else 10 + row for row in range(ROWS)]
    if task == "preference_tuning":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = Dataset.from_list([{name: ids(generator, length) for name in names} for length in lengths])
        sequences: Any = PairSequences(pairs, pad, with_mismatched=False)
        return TrainingRows(plan, sequences, None, collate_pairs(pad, None, masked=False), LONGEST)
    texts = [ids(generator, length) for length in lengths]
    rows = Dataset.from_list([{"input_ids": text, "labels": text} for text in texts])
    collate = collate_rows(pad, None, packed=False, attention=Attention("sdpa", mask=False))
    return TrainingRows(plan, TokenSequences(rows, pad), None, collate, LONGEST)


class TrainedRun:
    """A completed training run: its weights, optimizer states, log and batch widths."""

    def __init__(self, task: str, with_adapter: bool, model: Path, directory: Path, with_largest_batch: bool):
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = rows_of(task, tokenizer.pad_token_id)
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.1)
        set_seed(1)
        if with_adapter:
            base = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
        trainer = make_trainer(
            base,
            rows,
            tokenizer,
            cpu_arguments(
                directory,
                max_steps=STEPS,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
            ),
            config={"task": task},
        )
        self.widths: list[int] = []
        """Padded length of every batch that the model receives."""
        base.register_forward_pre_hook(
            lambda _, __, inputs: self.widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        if with_largest_batch:
            trainer.add_callback(AfterFirstStep(trainer.run_largest_batch))
        trainer.train()
        self.weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
        assert trainer.optimizer is not None
        self.moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        self.log = [
            {name: value for name, value in line.items() if "second" not in name and "memory" not in name}
            for line in trainer.state.log_history
            if "loss" in line
        ]


@pytest.mark.parametrize(
    ("task", "with_adapter"),
    [
        ("instruction_tuning", True),
        pytest.param("instruction_tuning", False, marks=pytest.mark.slow),
        pytest.param("preference_tuning", True, marks=pytest.mark.slow),
    ],
)
def test_run_of_the_largest_batch_does_not_change_weights_optimizer_states_or_log(
    task: str, with_adapter: bool, tiny_model: Path, tmp_path: Path
):
    plain = TrainedRun(task, with_adapter, tiny_model, tmp_path / "plain", with_largest_batch=False)
    checked = TrainedRun(task, with_adapter, tiny_model, tmp_path / "checked", with_largest_batch=True)

    assert len(plain.log) == STEPS
    assert checked.log == plain.log
    assert all(torch.equal(checked.weights[name], value) for name, value in plain.weights.items())
    assert all(map(torch.equal, checked.moments, plain.moments))

    # The largest batch follows the two batches of the first step and is as wide as any batch can be.
    # A batch takes one forward pass through the model, or two with a reference model.
    forwards = len(plain.widths) // (2 * STEPS)
    start = 2 * forwards
    widest = 80 if task == "preference_tuning" else 40
    assert checked.widths[start : start + forwards] == [widest] * forwards
    assert checked.widths[:start] + checked.widths[start + forwards :] == plain.widths
