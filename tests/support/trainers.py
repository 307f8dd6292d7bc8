"""Anneal's trainers on CPU, with a model and rows that a test provides: without plan, Ray and bucket."""

from pathlib import Path
from typing import Any

from trl import SFTConfig

from configs.schema import FinetuneConfig
from training.loop.preference import PreferenceTrainer
from training.loop.throughput import HostTimeline, PhaseClock, Throughput
from training.loop.trainers import FineTuningTrainer, TrainingRows


def cpu_arguments(directory: Path, **arguments: Any) -> SFTConfig:
    """Return TRL's arguments of a run on CPU that logs each step and saves nothing; `arguments` come on top."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
    }
    return SFTConfig(str(directory), **(defaults | arguments))


def make_trainer(
    model: Any,
    rows: TrainingRows,
    tokenizer: Any,
    arguments: SFTConfig,
    *,
    config: dict[str, Any] | None = None,
    base_model: str = "m",
    reference_model: Any = None,
) -> Any:
    """Return the trainer of the config's task.

    Args:
        model: The model, with its adapter if it has one.
        rows: Training and validation sequences.
        tokenizer: Its tokenizer.
        arguments: Result of `cpu_arguments`.
        config: Keys of the YAML, beside model and rows.
        base_model: Base model that a saved adapter names.
        reference_model: Reference model of preference tuning; None for the model without its adapter.
    """
    tokens = [1] * rows.order.shape.sequences
    throughput = Throughput(
        rows.order, tokens, tokens, clock=PhaseClock(HostTimeline()), flops=None, peak_flops=None
    )
    settings = FinetuneConfig.model_validate({"model_id": "m", "train_path": "t", **(config or {})})
    of_preferences = {"reference_model": reference_model} if settings.task == "preference_tuning" else {}
    return (PreferenceTrainer if of_preferences else FineTuningTrainer)(
        **of_preferences,
        config=settings,
        base_model=base_model,
        base_revision=None,
        rows=rows,
        model=model,
        args=arguments,
        tokenizer=tokenizer,
        callbacks=[throughput],
        throughput=throughput,
        on_eval_progress=lambda _: None,
        loss_of_transformers=True,
    )
