"""The predicted labels, the label tokens and the metrics of classification."""

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


def scores(*most_likely: int) -> torch.Tensor:
    """Return logits over ten tokens at each position, with one most likely token."""
    table = torch.zeros(len(most_likely), 10)
    for position, token in enumerate(most_likely):
        table[position, token] = 1.0
    return table


@pytest.mark.parametrize(
    ("expected", "most_likely", "predicted"),
    [
        ([5, 7], (5, 7), 0),
        ([5, 7], (5, 8), 1),
        ([5, 8], (5, 8), 1),
        ([5, 8], (6, 8), 2),
        ([6], (6,), 2),
        ([6], (5,), 0),  # a tie with label 1, which has the same first token
        ([6], (9,), 0),  # a token that starts no label is ignored; all others are equally likely
    ],
)
def test_predicted_label_is_the_most_likely_label(
    expected: list[int], most_likely: tuple[int, ...], predicted: int
):
    assert written_label(scores(*most_likely), expected, LABELS) == predicted


def test_accuracy_and_macro_f1_match_values_computed_by_hand():
    """Expected labels: a a b c; predicted: a b b b. F1 of a is 2/3, of b 1/2, of c 0."""
    trainer: Any = ClassificationTrainer.__new__(ClassificationTrainer)
    trainer.label_tokens = [*LABELS, [9]]  # the last label does not occur and is excluded from F1
    confusion = torch.zeros(4, 4)
    for expected, predicted in [(0, 0), (0, 1), (1, 1), (2, 1)]:
        confusion[expected, predicted] += 1
    figures = trainer.figures([4.0, 2.0, *confusion.flatten().tolist()])
    assert figures == pytest.approx({"loss": 2.0, "accuracy": 0.5, "f1": (2 / 3 + 1 / 2 + 0) / 3})


def rows(*labels: tuple[int, list[int]]) -> Dataset:
    return Dataset.from_list(
        [{"label": label, "labels": [IGNORED, IGNORED, *tokens]} for label, tokens in labels]
    )


def test_label_tokens_come_from_the_rows():
    """Training and validation rows are searched; labels without rows are excluded."""
    sources = [rows((2, [6]), (0, [5, 7]), (2, [6])), rows((1, [5, 8]))]
    assert label_tokens(sources, ["a", "b", "c", "never"]) == LABELS


def test_a_label_that_is_a_prefix_of_another_raises_an_error():
    with pytest.raises(DataError, match=r"'10'.*'1'"):
        label_tokens([rows((0, [5]), (1, [5, 8]))], ["1", "10"])


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        ([[-100, -100, -100, 5, 7, -100], [-100, -100, -100, -100, 6, -100]], 4),
        ([[-100] * 6, [-100] * 6], 1),  # padding rows, evaluated while other workers still have rows
    ],
)
def test_logits_are_computed_only_from_the_first_label_on(labels: list[list[int]], logits: int):
    """accelerate would convert the logits of all tokens to fp32."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    logit_counts = []
    model.lm_head.register_forward_hook(
        lambda module, arguments, output: logit_counts.append(output.shape[1])
    )
    trainer: Any = ClassificationTrainer.__new__(ClassificationTrainer)
    trainer.label_tokens = LABELS
    inputs = {"input_ids": torch.randint(0, 10, (2, 6)), "labels": torch.tensor(labels)}
    trainer._may_leave_out_logits = False
    with torch.no_grad():
        full_sums = trainer.sums(model, inputs)
        trainer._may_leave_out_logits = True
        assert torch.equal(trainer.sums(model, inputs), full_sums)
    assert logit_counts == [6, logits]
