"""The TRL trainer of a run, with our batches, an eval loss weighted by tokens, and checkpoints without what nobody reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # Unsloth replaces them here
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from configs.schema import FinetuneConfig
from training.data.batches import BatchShape, EpochDataLoader, TokenRows, TrainBatches, eval_batches
from training.data.prepare import IGNORED
from training.plan import RunPlan


def trainer_arguments(plan: RunPlan, output_directory: Path, *, eval_first: bool) -> SFTConfig:
    """The plan as TRL's arguments. With DeepSpeed, torch.distributed must be up already."""
    config = plan.config
    return SFTConfig(
        output_dir=str(output_directory),
        max_steps=plan.max_steps,
        per_device_train_batch_size=config.train_batch_size_per_device,
        per_device_eval_batch_size=config.eval_batch_size_per_device or config.train_batch_size_per_device,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.num_warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        bf16=config.dtype == "bf16",
        use_cpu=plan.device == "cpu",
        ddp_backend="gloo" if plan.device == "cpu" else "nccl",
        ddp_find_unused_parameters=False,
        # Unsloth's own kind is put into the model; with other kernels it means the usual one.
        gradient_checkpointing=bool(config.gradient_checkpointing)
        and not (config.gradient_checkpointing == "unsloth" and plan.kernels.provider == "unsloth"),
        deepspeed=plan.deepspeed,
        eval_strategy="no",  # the schedule callback asks for evaluation and checkpoints
        save_strategy="no",
        eval_on_start=eval_first,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_on_each_node=True,
        report_to=[config.logger.provider] if config.logger else [],
        run_name=plan.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


class FineTuningTrainer(SFTTrainer):
    """SFTTrainer over prepared tokens."""

    def __init__(
        self,
        *,
        config: FinetuneConfig,
        base_model: str,
        shape: BatchShape,
        longest: int,
        train_rows: Dataset,
        eval_rows: Dataset | None,
        model: Any,
        args: SFTConfig,
        tokenizer: Any,
        callbacks: list[TrainerCallback],
        on_eval_progress: Callable[[float], None],
        loss_of_transformers: bool,
    ):
        """See SFTTrainer.

        Args:
            config: The YAML.
            base_model: What saved adapters call the model below them: hub id, directory or URI.
            shape: How training rows are dealt out.
            longest: Tokens that `padding: max_length` pads to.
            train_rows: Prepared rows.
            eval_rows: Prepared rows, or None.
            model: Ready to train, its adapter on it.
            args: From `trainer_arguments`.
            tokenizer: Saved beside each checkpoint.
            callbacks: See callbacks.py.
            on_eval_progress: Told how much of an evaluation is done, 0 to 1.
            loss_of_transformers: TRL's loss is a Triton kernel; where there is no GPU, take the model's own.
        """
        multiple = longest if config.padding == "max_length" else (8 if not args.use_cpu else None)
        collator = DataCollatorForLanguageModeling(
            pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=multiple
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.base_model = base_model
        self.shape = shape
        self.eval_rows = eval_rows
        self.collator = collator
        self.on_eval_progress = on_eval_progress
        self.loss_of_transformers = loss_of_transformers

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss a trained token: of all workers together in training, of this batch in evaluation."""
        if self.loss_of_transformers:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_train_dataloader(self) -> EpochDataLoader:
        """This worker's micro-batches; not prepared by accelerate, which would deal rows twice in an uneven epoch."""
        batches = TrainBatches(self.shape, rank=self.args.process_index, seed=self.args.seed)
        rows = TokenRows(self.train_dataset, self.collator.pad_token_id)
        # Its own generator: drawing a base seed from the global one would tie dropout to how often we iterate.
        return EpochDataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.collator,
            pin_memory=not self.args.use_cpu,
            generator=torch.Generator(),
        )

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Eval loss as the sum over trained tokens divided by their number, over all workers.

        It does not depend on the number of workers, the batch size or how rows are padded.
        """
        del arguments, keywords
        if self.eval_rows is None:
            return {}
        rows = TokenRows(self.eval_rows, self.collator.pad_token_id)
        mine = eval_batches(
            len(rows), self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        )
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped
        assert model is not None
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for position, batch in enumerate(mine, start=1):
                inputs = self._prepare_inputs(self.collator([rows[index] for index in batch]))
                count = (inputs["labels"][:, 1:] != IGNORED).sum()
                with self.compute_loss_context_manager():
                    mean = self.compute_loss(model, dict(inputs))
                if count > 0:
                    totals += torch.stack([mean.double() * count, count.double()])
                self.on_eval_progress(position / len(mine))
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        metrics = {"eval_loss": float(totals[0] / totals[1])}
        self._metrics["eval"].clear()  # TRL's own averages are over batches, not tokens
        self.log(dict(metrics))
        model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # without TRL's model card
        assert self.args.output_dir is not None
        adapter = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / "adapter_config.json"
        if self.args.should_save and adapter.exists():
            # PEFT writes where the base lay on this node.
            settings = json.loads(adapter.read_text("utf-8")) | {"base_model_name_or_path": self.base_model}
            adapter.write_text(json.dumps(settings, indent=2), "utf-8")
