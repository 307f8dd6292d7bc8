"""Which label a model writes, and what is reported of it."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from training.data.errors import DataError
from training.data.labels import label_tokens
from training.data.row_index import IGNORED
from training.loop.trainers import ClassificationTrainer, written_label

LABELS = [[5, 7], [5, 8], [6]]


def scores(*likeliest: int) -> torch.Tensor:
    """Of ten tokens at each place: one of them is the likeliest."""
    table = torch.zeros(len(likeliest), 10)
    for place, token in enumerate(likeliest):
        table[place, token] = 1.0
    return table


@pytest.mark.parametrize(
    ("right", "likeliest", "written"),
    [
        ([5, 7], (5, 7), 0),
        ([5, 7], (5, 8), 1),
        ([5, 8], (5, 8), 1),
        ([5, 8], (6, 8), 2),
        ([6], (6,), 2),
        ([6], (5,), 0),  # or 1: they begin alike
        ([6], (9,), 0),  # a token that begins no label does not count; all others are equally likely
    ],
)
def test_the_label_is_the_likeliest_of_those_that_may_be_written(
    right: list[int], likeliest: tuple[int, ...], written: int
):
    assert written_label(scores(*likeliest), right, LABELS) == written


def test_accuracy_and_f1():
    """By hand. Right: a a b c, written: a b b b. F1 of a is 2/3, of b 1/2, of c 0."""
    trainer: Any = ClassificationTrainer.__new__(ClassificationTrainer)
    trainer.label_tokens = [*LABELS, [9]]  # the last one occurs nowhere and counts for nothing
    taken_for = torch.zeros(4, 4)
    for right, written in [(0, 0), (0, 1), (1, 1), (2, 1)]:
        taken_for[right, written] += 1
    figures = trainer.figures([4.0, 2.0, *taken_for.flatten().tolist()])
    assert figures == pytest.approx({"loss": 2.0, "accuracy": 0.5, "f1": (2 / 3 + 1 / 2 + 0) / 3})


def rows(*labels: tuple[int, list[int]]) -> Dataset:
    return Dataset.from_list(
        [{"label": label, "labels": [IGNORED, IGNORED, *tokens]} for label, tokens in labels]
    )


def test_tokens_of_labels_come_from_the_rows():
    """Of training or validation, in the order of the YAML; a label that no row has is none."""
    sources = [rows((2, [6]), (0, [5, 7]), (2, [6])), rows((1, [5, 8]))]
    assert label_tokens(sources, ["a", "b", "c", "never"]) == LABELS


def test_a_label_that_is_a_prefix_of_another_raises_an_error():
    with pytest.raises(DataError, match=r"'10'.*'1'"):
        label_tokens([rows((0, [5]), (1, [5, 8]))], ["1", "10"])


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        ([[-100, -100, -100, 5, 7, -100], [-100, -100, -100, -100, 6, -100]], 4),
        ([[-100] * 6, [-100] * 6], 1),  # padding, which is evaluated where other workers have rows
    ],
)
def test_only_logits_from_the_first_label_on_are_made(labels: list[list[int]], logits: int):
    """accelerate would turn those of all tokens to fp32."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    made = []
    model.lm_head.register_forward_hook(lambda module, given, made_of_it: made.append(made_of_it.shape[1]))
    trainer: Any = ClassificationTrainer.__new__(ClassificationTrainer)
    trainer.label_tokens = LABELS
    inputs = {"input_ids": torch.randint(0, 10, (2, 6)), "labels": torch.tensor(labels)}
    trainer._may_leave_out_logits = False
    with torch.no_grad():
        of_all = trainer.sums(model, inputs)
        trainer._may_leave_out_logits = True
        assert torch.equal(trainer.sums(model, inputs), of_all)
    assert made == [6, logits]
