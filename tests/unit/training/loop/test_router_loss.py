"""The load-balancing loss of a mixture of experts, in training and in evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from tests.support.tiny_model import make_model
from tests.support.trainers import cpu_arguments, make_trainer
from training.data.batches import BatchPlan, BatchShape, TokenSequences
from training.loop.trainers import FineTuningTrainer, TrainingRows, collate_rows
from training.models.attention import Attention

ROWS = 4
IDS = torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose load-balancing loss is as large as its cross-entropy."""
    return make_model(
        tmp_path_factory.mktemp("mixture"),
        kind=Qwen3MoeConfig,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        router_aux_loss_coef=1.0,
    )


def trainer_of(mixture: Path, directory: Path, batch: int, *, router_loss: bool = True) -> FineTuningTrainer:
    """Return a trainer of one step on equal rows, in micro-batches of this size; the config has the router loss on or off."""
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    model: Any = AutoModelForCausalLM.from_pretrained(
        mixture, dtype=torch.float32, output_router_logits=router_loss
    )
    order = BatchPlan(BatchShape(ROWS, batch, 1, ROWS // batch), 0)
    rows = TokenSequences(
        Dataset.from_list([{"input_ids": IDS, "labels": IDS}] * ROWS), tokenizer.pad_token_id
    )
    collate = collate_rows(tokenizer.pad_token_id, None, packed=False, attention=Attention("sdpa", mask=True))
    arguments = cpu_arguments(
        directory,
        max_steps=1,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=ROWS // batch,
    )
    return make_trainer(model, TrainingRows(order, rows, rows, collate), tokenizer, arguments)


@pytest.fixture(scope="module")
def expected(mixture: Path) -> tuple[float, float]:
    """Cross-entropy and load-balancing loss of a row, from the model in transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    row = torch.tensor([IDS])
    with torch.no_grad():
        cross_entropy = model(row, labels=row, output_router_logits=False).loss.item()
        return cross_entropy, model(row, output_router_logits=True).aux_loss.item()


@pytest.mark.parametrize("batch", [ROWS, 1])
def test_training_weighs_the_router_loss_once_whatever_the_accumulation(
    batch: int, mixture: Path, expected: tuple[float, float], tmp_path: Path
):
    trainer = trainer_of(mixture, tmp_path, batch)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.parametrize("batch", [ROWS, 1])
def test_eval_loss_is_the_cross_entropy(
    batch: int, mixture: Path, expected: tuple[float, float], tmp_path: Path
):
    trainer = trainer_of(mixture, tmp_path, batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-5)


def test_router_loss_is_off_where_the_models_config_turns_it_off(
    mixture: Path, expected: tuple[float, float], tmp_path: Path
):
    trainer = trainer_of(mixture, tmp_path, 1, router_loss=False)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("router_loss", [False, True])
def test_the_models_config_is_not_changed(router_loss: bool, mixture: Path, tmp_path: Path):
    model: Any = trainer_of(mixture, tmp_path, 1, router_loss=router_loss).model
    assert model.config.output_router_logits is router_loss
    assert model.config.router_aux_loss_coef == 1.0
