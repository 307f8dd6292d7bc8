"""Trying the largest batch behind the first step leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig

from configs.schema import FinetuneConfig
from training.data.batches import BatchPlan, BatchShape, PairSequences, TokenSequences
from training.loop.callbacks import AfterFirstStep
from training.loop.preference import PreferenceTrainer, collate_pairs
from training.loop.throughput import HostTimeline, PhaseClock, Throughput
from training.loop.trainers import FineTuningTrainer, TrainingRows, collate_rows
from training.models.attention import Attention

ROWS, STEPS, LONGEST = 8, 3, 5


def ids(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, 500, (length,), generator=generator).tolist()


def rows_of(task: str, pad: int) -> TrainingRows:
    generator = torch.Generator().manual_seed(0)
    order = BatchPlan(BatchShape(ROWS, 2, 1, 2), 0)
    lengths = [40 if row == LONGEST else 10 + row for row in range(ROWS)]
    if task == "preference_tuning":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = Dataset.from_list([{name: ids(generator, length) for name in names} for length in lengths])
        sequences: Any = PairSequences(pairs, pad, with_mismatched=False)
        return TrainingRows(order, sequences, None, collate_pairs(pad, None, masked=False), LONGEST)
    texts = [ids(generator, length) for length in lengths]
    rows = Dataset.from_list([{"input_ids": text, "labels": text} for text in texts])
    collate = collate_rows(pad, None, packed=False, attention=Attention("sdpa", mask=False))
    return TrainingRows(order, TokenSequences(rows, pad), None, collate, LONGEST)


class Trained:
    """Everything that a run ends with."""

    def __init__(self, task: str, adapts: bool, model: Path, directory: Path, rehearses: bool):
        config = FinetuneConfig.model_validate({"model_id": "m", "train_path": "t", "task": task})
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = rows_of(task, tokenizer.pad_token_id)
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.1)
        set_seed(1)
        if adapts:
            base = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
        throughput = Throughput(
            rows.order, [1] * ROWS, [1] * ROWS, clock=PhaseClock(HostTimeline()), flops=None, peak_flops=None
        )
        more = {"reference_model": None} if task == "preference_tuning" else {}
        trainer = (PreferenceTrainer if more else FineTuningTrainer)(
            **more,
            config=config,
            base_model="m",
            rows=rows,
            model=base,
            args=SFTConfig(
                str(directory),
                use_cpu=True,
                bf16=False,
                report_to=[],
                max_steps=STEPS,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
            ),
            tokenizer=tokenizer,
            callbacks=[throughput],
            throughput=throughput,
            on_eval_progress=lambda _: None,
            loss_of_transformers=True,
        )
        self.widths: list[int] = []
        """Of every batch that the model sees."""
        base.register_forward_pre_hook(
            lambda _, __, inputs: self.widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        if rehearses:
            trainer.add_callback(AfterFirstStep(trainer.rehearse))
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
    ("task", "adapts"),
    [("instruction_tuning", True), ("instruction_tuning", False), ("preference_tuning", True)],
)
def test_the_end_is_that_of_a_run_without(task: str, adapts: bool, tiny_model: Path, tmp_path: Path):
    plain = Trained(task, adapts, tiny_model, tmp_path / "plain", rehearses=False)
    rehearsed = Trained(task, adapts, tiny_model, tmp_path / "rehearsed", rehearses=True)

    assert len(plain.log) == STEPS
    assert rehearsed.log == plain.log
    assert all(torch.equal(rehearsed.weights[name], value) for name, value in plain.weights.items())
    assert all(map(torch.equal, rehearsed.moments, plain.moments))

    # The one batch more, behind the two of the first step, is as wide as any batch can be.
    passes = len(plain.widths) // (
        2 * STEPS
    )  # a batch goes through the model once, or through its reference as well
    behind = 2 * passes
    widest = 80 if task == "preference_tuning" else 40
    assert rehearsed.widths[behind : behind + passes] == [widest] * passes
    assert rehearsed.widths[:behind] + rehearsed.widths[behind + passes :] == plain.widths
