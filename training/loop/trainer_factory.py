"""Trainer factory: build the batches and the trainer for a plan's task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.schema import FinetuneConfig
from training.data.batches import (
    BatchPlan,
    PairSequences,
    TokenSequences,
    longest_sequence,
    pack,
    pad_to_multiple_of,
)
from training.data.labels import label_tokens
from training.data.prepared import PreparedData
from training.loop.preference import PreferenceTrainer, collate_pairs
from training.loop.trainers import (
    ClassificationTrainer,
    FineTuningTrainer,
    TrainingRows,
    collate_rows,
)
from training.models import add_reference
from training.models.request import ModelRequest
from training.planning.plan import RunPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_trainer(
    plan: RunPlan,
    order: BatchPlan,
    train: PreparedData,
    valid: PreparedData | None,
    *,
    more_valid: Mapping[str, PreparedData] | None = None,
    model: Any,
    request: ModelRequest,
    tokenizer: "PreTrainedTokenizerFast",
    **arguments: Any,
) -> FineTuningTrainer:
    """Build the trainer for the plan's task.

    Args:
        plan: The run's plan.
        order: Assigns sequences to steps.
        train: Prepared training rows.
        valid: Prepared validation rows, or None.
        more_valid: Further validation sets by name.
        model: The model to train.
        request: The request from which the model was built.
        tokenizer: The model's tokenizer.
        arguments: Further arguments of FineTuningTrainer.
    """
    config = plan.config
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)
    more = more_valid or {}
    multiple = pad_to_multiple_of(config, plan.device, train.summary.longest)
    arguments |= {
        "config": config,
        "base_model": plan.base_model,
        "base_revision": plan.base_revision,
        "model": model,
        "tokenizer": tokenizer,
        "loss_of_transformers": plan.device == "cpu" and plan.resolved.kernels.provider != "unsloth",
    }
    if config.task == "preference_tuning":

        def pairs(rows: PreparedData) -> PairSequences:
            with_mismatched = config.preference.takes_unpaired_rows
            return PairSequences(rows.dataset(), pad_token_id, with_mismatched=with_mismatched)

        return PreferenceTrainer(
            reference_model=add_reference(model, request) if config.preference.needs_reference else None,
            rows=TrainingRows(
                order,
                pairs(train),
                pairs(valid) if valid else None,
                collate_pairs(pad_token_id, multiple, masked=plan.resolved.attention.mask),
                longest_sequence(train.index.length, None),
                {name: pairs(prepared) for name, prepared in more.items()},
            ),
            **arguments,
        )
    rows = TrainingRows(
        order,
        TokenSequences(train.dataset(), pad_token_id, order.packs),
        _validation(config, valid, pad_token_id) if valid else None,
        collate_rows(
            pad_token_id,
            multiple,
            packed=config.packing,
            attention=plan.resolved.attention,
            rank=arguments["args"].process_index,
        ),
        longest_sequence(train.index.length, order.packs),
        {name: _validation(config, prepared, pad_token_id) for name, prepared in more.items()},
    )
    if config.task == "classification":
        assert config.classifier_config is not None
        sources = [prepared.dataset() for prepared in (train, valid, *more.values()) if prepared]
        tokens = label_tokens(sources, config.classifier_config.label_tokens)
        return ClassificationTrainer(label_tokens=tokens, rows=rows, **arguments)
    return FineTuningTrainer(rows=rows, **arguments)


def _validation(config: FinetuneConfig, valid: PreparedData, pad_token_id: int) -> TokenSequences:
    capacity = config.context_length or valid.summary.longest
    packs = pack(valid.index.length, capacity) if config.packing else None
    return TokenSequences(valid.dataset(), pad_token_id, packs)
