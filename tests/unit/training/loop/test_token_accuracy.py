"""`mean_token_accuracy` of steps and evaluations: the share of loss tokens that were the most likely ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.trainers import cpu_arguments, make_trainer
from training.data.batches import BatchPlan, BatchShape, TokenSequences
from training.data.row_index import IGNORED
from training.loop.trainers import TrainingRows, collate_rows
from training.models.attention import Attention

LENGTHS = [9, 4, 17, 6, 12, 30, 5, 8]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(model: Any) -> Dataset:
    """Return rows with a prompt of two tokens; about half of the other labels are what the model predicts."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in LENGTHS:
        tokens = torch.randint(3, 500, (length,), generator=generator)
        with torch.no_grad():
            predicted = model(input_ids=tokens[None]).logits[0].argmax(-1)
        is_right = torch.rand(length - 1, generator=generator) < 0.5
        labels = torch.where(is_right, predicted[:-1], tokens[1:])
        examples.append({"input_ids": tokens.tolist(), "labels": [IGNORED, IGNORED, *labels[1:].tolist()]})
    return Dataset.from_list(examples)


def plain_accuracy(model: Any, rows: Any) -> float:
    """Return the accuracy as computed row by row in plain transformers."""
    correct = tokens = 0
    for row in rows:
        with torch.no_grad():
            predicted = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        for guess, label in zip(predicted, row["labels"][1:], strict=False):
            tokens += label != IGNORED
            correct += guess == label
    return correct / tokens


def test_accuracy_equals_that_of_plain_transformers(
    model: Any, rows: Dataset, tiny_model: Path, tmp_path: Path
):
    """Rows have different lengths, so means over batches would differ from the mean over tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sequences = TokenSequences(rows, tokenizer.pad_token_id)
    collate = collate_rows(
        tokenizer.pad_token_id, None, packed=False, attention=Attention("sdpa", mask=False)
    )
    order = BatchPlan(BatchShape(len(rows), 2, 1, 2), 0)
    arguments = cpu_arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        eval_on_start=True,
        eval_strategy="no",
    )
    trained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    training_rows = TrainingRows(order, sequences, sequences, collate)
    trainer = make_trainer(trained, training_rows, tokenizer, arguments, config={"valid_path": "v"})
    trainer.train()
    evaluated, step, *_ = trainer.state.log_history
    expected = plain_accuracy(model, rows)
    assert 0.3 < expected < 0.7
    assert evaluated["eval_mean_token_accuracy"] == pytest.approx(expected)
    of_step = rows.select(order.rows_of_step(1))
    assert step["mean_token_accuracy"] == pytest.approx(plain_accuracy(model, of_step))
