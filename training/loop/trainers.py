"""TRL trainers with a precomputed batch plan, a token-weighted eval loss, and minimal checkpoints."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_pt_utils import safe_globals
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # Unsloth replaces them here
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from configs.schema import FinetuneConfig
from training.checkpoints import store as checkpoints
from training.data.batches import (
    BatchPlan,
    EpochDataLoader,
    TrainBatches,
    eval_batches,
    part_of_sequences,
    with_ends_of_rows,
    without_mask,
)
from training.data.row_index import IGNORED
from training.loop.throughput import Throughput
from training.models.adapter import base_of
from training.models.attention import Attention
from training.planning.plan import RunPlan

# TRL requires a dataset; get_train_dataloader reads the real one.
_PLACEHOLDER_DATASET = datasets.Dataset.from_dict({"input_ids": [[0]]})


def trainer_arguments(plan: RunPlan, output_directory: Path, *, devices: int, eval_first: bool) -> SFTConfig:
    """Convert the plan into TRL arguments for this number of devices.

    With DeepSpeed, torch.distributed must be initialized first.
    """
    config = plan.config
    return SFTConfig(
        output_dir=str(output_directory),
        max_steps=plan.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size_per_device or config.batch_size,
        gradient_accumulation_steps=config.accumulation_on(devices),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.scheduler_arguments(),
        warmup_steps=config.warmup_steps(plan.max_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        seed=config.seed,
        bf16=config.dtype == "bf16",
        use_cpu=plan.device == "cpu",
        # On CUDA, accelerate selects it. An explicit value fails on one GPU if Unsloth has removed the process group.
        ddp_backend="gloo" if plan.device == "cpu" else None,
        ddp_find_unused_parameters=False,
        # Unsloth patches its checkpointing into the model; with other kernels, "unsloth" means the standard one.
        gradient_checkpointing=bool(config.gradient_checkpointing)
        and not (config.gradient_checkpointing == "unsloth" and plan.resolved.kernels.provider == "unsloth"),
        deepspeed=plan.deepspeed,
        eval_strategy="no",  # the schedule callback triggers evaluation and checkpoints
        save_strategy="no",
        eval_on_start=eval_first,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_on_each_node=True,
        report_to=[],  # the tracking callback reports
        run_name=plan.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        torch_empty_cache_steps=None,  # Unsloth's default would empty the cache at every micro-batch of some steps
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


@dataclass(frozen=True)
class TrainingRows:
    """The training and validation sequences of a run, with their batch plan and collator."""

    order: BatchPlan
    """Assigns sequences to steps."""
    train: Dataset[dict[str, Any]]
    """Sequences that `order` indexes, including PADDING_ROW."""
    valid: Dataset[dict[str, Any]] | None
    """Validation sequences, or None."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    longest: int = 0
    """Index of the training sequence with the most tokens."""
    more_valid: Mapping[str, Dataset[dict[str, Any]]] = field(default_factory=dict)
    """Further validation sequences by name."""


def collate_rows(
    pad_token_id: int, multiple: int | None, *, packed: bool, attention: Attention, rank: int = 0
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return the collator for padded rows or packed sequences.

    Args:
        pad_token_id: Token that pads sequences.
        multiple: Passed as `pad_to_multiple_of`.
        packed: True if sequences contain several rows.
        attention: The attention of the model that gets the batches.
        rank: The worker's rank.
    """
    in_one_line = packed and attention.takes_row_boundaries
    collator = DataCollatorForLanguageModeling(
        pad_token_id,
        pad_to_multiple_of=multiple,
        padding_free=in_one_line,
        return_position_ids=packed,
    )
    if attention.mask:
        return collator
    collate = without_mask(collator)
    if in_one_line:
        collate = with_ends_of_rows(collate)
    size = attention.sequence_parallel_size
    return part_of_sequences(collate, size, rank % size) if size > 1 else collate


class FineTuningTrainer(SFTTrainer):
    """An SFTTrainer for pretokenized sequences."""

    def __init__(
        self,
        *,
        config: FinetuneConfig,
        base_model: str,
        base_revision: str | None,
        rows: TrainingRows,
        model: Any,
        args: SFTConfig,
        tokenizer: Any,
        callbacks: list[TrainerCallback],
        throughput: Throughput,
        on_eval_progress: Callable[[float], None],
        loss_of_transformers: bool,
    ):
        """Build the SFTTrainer and attach the batch plan, throughput and progress callbacks.

        Args:
            config: The run's YAML config.
            base_model: Base model recorded in saved adapters: Hub id, directory or URI.
            base_revision: Its commit, if it is on the Hub.
            rows: Training and validation sequences.
            model: The model with its adapter attached.
            args: Result of `trainer_arguments`.
            tokenizer: Saved with each checkpoint.
            callbacks: Trainer callbacks; the list must include `throughput`.
            throughput: Measures the speed of each step.
            on_eval_progress: Called with the fraction of the evaluation that is done, 0 to 1.
            loss_of_transformers: True to use the model's own loss; TRL's loss is a Triton kernel and needs a GPU.
        """
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        text_config = base_of(model).config.get_text_config()
        returns_router_logits = getattr(text_config, "output_router_logits", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=rows.collate,
            train_dataset=_PLACEHOLDER_DATASET,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self._has_router = returns_router_logits is not None
        if self._has_router:
            # TRL turns the load-balancing loss on, also where the model's config turns it off. gpt-oss has a coefficient of 0.9.
            text_config.output_router_logits = returns_router_logits
            self.aux_loss_enabled = self.aux_loss_enabled and returns_router_logits
        # TRL casts a new adapter on a 4-bit base to bf16, but not a restored one. Keep both in their original dtype.
        for parameter, data in trained.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        self.config = config
        self.base_model = base_model
        self.base_revision = base_revision
        self.rows = rows
        self.throughput = throughput
        self.clock = throughput.clock
        self.on_eval_progress = on_eval_progress
        self.loss_of_transformers = loss_of_transformers
        self._predicted: torch.Tensor | None = None
        """(correct predictions, loss tokens) of the last batch whose logits are known, as float64."""
        self._predicted_in_step: torch.Tensor | None = None
        self.before_loading: Callable[[Any], None] | None = None
        """Called with DeepSpeed's engine before it loads a checkpoint, to convert the checkpoint's files."""

    @property
    def replica(self) -> int:
        """The index of the batches that this worker gets: workers that share sequences get the same."""
        return self.args.process_index // self.config.sequence_parallel_size

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.before_loading is None:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self.before_loading(self.model_wrapped)
            deepspeed_load_checkpoint(
                self.model_wrapped, resume_from_checkpoint, load_module_strict=not self.config.trains_adapter
            )
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self.accelerator.backward = self.clock.timed("backward", self.accelerator.backward)
        if self.is_deepspeed_enabled:  # DeepSpeed runs the optimizer step inside the backward pass
            engine: Any = self.model_wrapped
            engine.step = self.clock.timed("optimizer", engine.step)
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step and their number of loss tokens over all workers.

        This restores the implementation of transformers. Unsloth's replacement reduces the counts as CPU tensors, which NCCL
        does not support.
        """

        def get() -> Any:
            batches = list(itertools.islice(epoch_iterator, num_batches))
            return batches, self._get_num_items_in_batch(batches, device)

        return self.clock.timed("data", get)()

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Run forward and backward of a micro-batch; the optimizer runs after the last one of a step."""
        loss = self.clock.timed("forward", super().training_step)(*arguments, **keywords)
        if self._predicted is not None:
            before = self._predicted_in_step
            self._predicted_in_step = self._predicted if before is None else before + self._predicted
        if self.accelerator.sync_gradients:
            self.clock.enter("optimizer")
        return loss

    def run_largest_batch(self) -> None:
        """Run forward and backward of the largest possible batch, so that out-of-memory errors occur before training.

        The call restores random states, drops the gradients without an all-reduce, and leaves loss and metrics unchanged.
        Not for DeepSpeed, which accumulates every backward pass in its own buffers.
        """
        batch = self.rows.collate(
            [self.rows.train[self.rows.longest]] * self.args.per_device_train_batch_size
        )
        counted = copy.deepcopy(self._metrics)
        model: Any = self.model_wrapped
        devices = [] if self.args.use_cpu else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices), self.accelerator.no_sync(model):
            super().training_step(model, batch, torch.tensor(1, device=self.args.device))
        model.zero_grad()
        self._metrics = counted
        self.throughput.restart()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput figures to the training logs."""
        # TRL's count treats a batch without a mask as one row and restarts at 0 on resume; use `figures_of_step` instead.
        self._metrics["train"].pop("num_tokens", None)
        if "loss" in logs:
            logs |= self.throughput.figures_of_step()
            if self._predicted_in_step is not None:
                correct, tokens = self.of_all_workers(self._predicted_in_step).tolist()
                self._predicted_in_step = None
                logs |= {"mean_token_accuracy": correct / tokens} if tokens else {}
        super().log(logs, start_time)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss per loss token: over all workers in training, over this batch in evaluation.

        In training, a mixture of experts whose config has `output_router_logits: true` adds its load-balancing loss, averaged
        over the micro-batches of the step.
        """
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # loss 0 instead of NaN without loss tokens
        if self.loss_of_transformers:
            return self._loss_of_transformers(model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss_of_transformers(
        self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        if self._has_router:
            inputs = {**inputs, "output_router_logits": self.aux_loss_enabled}
        both: Any = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        loss, outputs = both
        self._predicted = count_correct(outputs.logits, targets_of(inputs))
        if self.aux_loss_enabled and num_items_in_batch is not None:
            # transformers multiplies the load-balancing loss by the workers and adds it up over the micro-batches.
            weight = 1 / self.current_gradient_accumulation_steps - self.args.world_size
            loss = loss + weight * self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> EpochDataLoader:
        """Return this worker's micro-batches, without accelerate, which would duplicate rows in an uneven epoch."""
        # With a separate generator, the number of iterations does not change the dropout masks.
        return EpochDataLoader(
            self.rows.train,
            batch_sampler=TrainBatches(self.rows.order, rank=self.replica),
            collate_fn=self.rows.collate,
            pin_memory=not self.args.use_cpu,
            generator=torch.Generator(),
        )

    def sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what an evaluation sums over all batches: loss, number of loss tokens and correct predictions, as float64.

        The number of correct predictions is NaN if the kernels compute neither logits nor it.
        """
        count = (targets_of(inputs) != IGNORED).sum()
        # Padding batches run too, because the forward pass contains collectives.
        mean = self.compute_loss(model, dict(inputs))
        if count == 0:
            return torch.zeros(3, dtype=torch.float64, device=self.args.device)
        return torch.stack([mean.double() * count, count.double(), self._correct_in_batch(count)])

    def _correct_in_batch(self, count: torch.Tensor) -> torch.Tensor:
        if self.loss_of_transformers:
            assert self._predicted is not None
            return self._predicted[0]
        # TRL's accuracy is that of all workers' batches, so the products add up to the correct predictions of all workers.
        accuracies = self._metrics["eval"].get("mean_token_accuracy") or [math.nan]
        return accuracies[-1] * count.double()

    def figures(self, totals: list[float]) -> dict[str, float]:
        """Convert the sums over all batches and workers into the reported metrics, `loss` among them."""
        loss, tokens, correct = totals
        accuracy = {} if math.isnan(correct) else {"mean_token_accuracy": correct / tokens}
        return {"loss": loss / tokens} | accuracy

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        set_learning_rates(self.optimizer, self.lr_scheduler)
        if not self.is_deepspeed_enabled:
            page_states(self.optimizer)

    def _evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        return self.clock.timed("evaluation", super()._evaluate)(*arguments, **keywords)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Return eval loss per loss token and the other eval metrics, summed over all workers.

        With several validation sets, the metrics of each have its name: eval_NAME_loss. Those of the first are without a name, too.
        The result does not depend on the number of workers, the batch size, padding or packing.
        """
        del arguments, keywords
        if self.rows.valid is None:
            return {}
        figures = self.evaluated(self.rows.valid)
        metrics = {f"eval_{figure}": value for figure, value in figures.items()}
        names = list(self.config.valid_sets)
        for name in names if names != [""] else []:
            if name != names[0]:
                figures = self.evaluated(self.rows.more_valid[name])
            metrics |= {f"eval_{name}_{figure}": value for figure, value in figures.items()}
        self._metrics["eval"].clear()  # TRL's own averages are over batches, not tokens
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluated(self, sequences: Any) -> dict[str, float]:
        """Return the metrics of a validation set."""
        return self.figures(self.added_up(sequences, self.sums).tolist())

    def added_up(self, sequences: Any, sums: Callable[[Any, dict[str, Any]], torch.Tensor]) -> torch.Tensor:
        """Return the sums over all batches and workers, computed without gradients or dropout."""
        mine = eval_batches(
            len(sequences),
            self.args.per_device_eval_batch_size,
            self.config.replicas_on(self.args.world_size),
            self.replica,
        )
        model = self.model_wrapped
        assert model is not None
        was_training, balances = model.training, self.aux_loss_enabled
        model.eval()
        self.aux_loss_enabled = False  # the load-balancing loss depends on the batches
        parts = []
        with torch.no_grad():
            for position, batch in enumerate(mine, start=1):
                inputs = self._prepare_inputs(self.rows.collate([sequences[index] for index in batch]))
                with self.compute_loss_context_manager():
                    parts.append(sums(model, inputs))
                self.on_eval_progress(position / len(mine))
        model.train(was_training)
        self.aux_loss_enabled = balances
        return self.of_all_workers(torch.stack(parts).sum(0))

    def of_all_workers(self, sums: torch.Tensor) -> torch.Tensor:
        """All-reduce the sums over workers."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this rank's random states, or derive new ones if the checkpoint has none for this rank."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        rank, world_size = self.args.process_index, self.args.world_size
        if not has_random_states(Path(checkpoint), rank, world_size):
            set_seed(seed_of_new_rank(self.config.seed, self.state.global_step, rank))
        elif world_size > 1 and not self.args.use_cpu:
            own = state_of_noted_device(random_states(Path(checkpoint), rank, world_size))
            if own is not None:
                torch.cuda.set_rng_state(own)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        rank, world_size = self.args.process_index, self.args.world_size
        if world_size > 1 and not self.args.use_cpu:
            note_device(random_states(Path(output_dir), rank, world_size), torch.cuda.current_device())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoints.staging(directory):
            # transformers' method, since TRL's also writes a model card.
            self.clock.timed("saving", Trainer._save_checkpoint)(self, model, trial)
            adapter = directory / "adapter_config.json"
            if self.args.should_save and adapter.exists():
                adapted: Any = self.accelerator.unwrap_model(self.model)
                tied = getattr(adapted.peft_config["default"], "modules_to_tie", None) or ()
                write_same_everywhere(adapter, self.base_model, self.base_revision, tied)


def targets_of(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the token that each position should predict, or IGNORED if it does not contribute to the loss, (rows, tokens)."""
    if "shift_labels" in inputs:  # the target of a part's last token is in the part of another worker
        return inputs["shift_labels"]
    return pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)


def count_correct(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (loss tokens whose most likely prediction is right, loss tokens) as float64.

    Args:
        logits: Logits of all positions, (rows, tokens, vocabulary).
        targets: See `targets_of`.
    """
    counted = targets != IGNORED
    correct = logits.detach()[counted].argmax(-1) == targets[counted]
    return torch.stack([correct.sum(), counted.sum()]).double()


def write_same_everywhere(
    adapter_config: Path, base_model: str, base_revision: str | None, tied: Iterable[str]
) -> None:
    """Make PEFT's config file reproducible: replace the node's local base path and sort the lists that come from sets.

    Args:
        adapter_config: The file.
        base_model: Hub id, directory or URI of the base model.
        base_revision: Commit of a base model on the Hub.
        tied: Modules of modules_to_save that PEFT ties to the embedding. It removes them from the list, but ties the embeddings of GPT-2
            and BLOOM again only if the list has lm_head.
    """
    base = {"base_model_name_or_path": base_model, "revision": base_revision}
    settings = json.loads(adapter_config.read_text("utf-8")) | base
    if tied:
        settings["modules_to_save"] = sorted({*settings["modules_to_save"], *tied})
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(settings.get(name), list):
            settings[name].sort()
    adapter_config.write_text(json.dumps(settings, indent=2), "utf-8")


def set_learning_rates(optimizer: Any, scheduler: Any) -> None:
    """Set the learning rates of the next step from the schedule.

    The restored rates are those of the checkpoint's schedule. Those of a run that is now longer differ: a cosine or linear
    schedule has ended at 0 there.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    rates = [
        base * rate(schedule.last_epoch)
        for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def page_states(optimizer: Any) -> None:
    """Move the restored states of a paged optimizer into paged memory, which can be evicted from the GPU.

    bitsandbytes loads them into unpaged memory but treats them as paged.
    """
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    if not getattr(unwrapped, "is_paged", False):
        return
    for parameter, states in unwrapped.state.items():
        for name in states.keys() & {"state1", "state2"}:
            pages = unwrapped.get_state_buffer(parameter, dtype=states[name].dtype)
            states[name] = pages.copy_(states[name])


def has_random_states(checkpoint: Path, rank: int, world_size: int) -> bool:
    """Return whether a local checkpoint contains the random states of this rank at this world size."""
    return random_states(checkpoint, rank, world_size).is_file()


def random_states(checkpoint: Path, rank: int, world_size: int) -> Path:
    """Return the path where transformers stores a rank's random states."""
    return checkpoint / (f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth")


def note_device(file: Path, device: int) -> None:
    """Add the rank's device index to its saved GPU random states, since another node may assign another index."""
    with safe_globals():
        states = torch.load(file, weights_only=True)
    torch.save(states | {"own_device": device}, file)


def state_of_noted_device(file: Path) -> torch.Tensor | None:
    """Return the random state of the GPU that the rank used, or None if the file has no device index."""
    with safe_globals():
        states = torch.load(file, weights_only=True)
    return states["cuda"][states["own_device"]] if "own_device" in states else None


def seed_of_new_rank(seed: int, step: int, rank: int) -> int:
    """Return the seed for a rank without saved random states: deterministic, and different for every rank and step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


class ClassificationTrainer(FineTuningTrainer):
    """A FineTuningTrainer that reports accuracy and F1 of the labels that the model generates."""

    def __init__(self, *, label_tokens: list[list[int]], **arguments: Any):
        """Build the trainer.

        Args:
            label_tokens: Token ids of each label.
            arguments: Passed to FineTuningTrainer.
        """
        super().__init__(**arguments)
        self.label_tokens = label_tokens
        self._may_leave_out_logits = (
            "logits_to_keep" in signature(base_of(arguments["model"]).forward).parameters
        )

    def sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return loss, number of loss tokens and the flattened confusion matrix [true label, predicted label]."""
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        is_label = inputs["labels"][:, 1:] != IGNORED
        tokens = inputs["labels"][:, 1:][is_label]
        # Keep logits only from the first label token on: in fp32, those of all tokens would take gigabytes.
        if self._may_leave_out_logits:
            places = is_label.any(0).nonzero()
            is_label = is_label[:, int(places[0]) if len(places) else is_label.shape[1] :]
            unlabelled["logits_to_keep"] = is_label.shape[1] + 1
        logits = model(**unlabelled | {"use_cache": False}).logits
        scores = logits[:, :-1][is_label].float()
        loss = cross_entropy(scores, tokens, reduction="none").double().sum()
        taken_for = torch.zeros(len(self.label_tokens), len(self.label_tokens), dtype=torch.float64)
        count_of_rows = is_label.sum(1).tolist()
        for row_scores, row_tokens in zip(
            scores.cpu().split(count_of_rows), tokens.split(count_of_rows), strict=True
        ):
            if label := row_tokens.tolist():
                written = written_label(row_scores, label, self.label_tokens)
                taken_for[self.label_tokens.index(label), written] += 1
        count = torch.tensor(len(tokens), dtype=torch.float64, device=loss.device)
        return torch.cat([torch.stack([loss, count]), taken_for.flatten().to(loss.device)])

    def figures(self, totals: list[float]) -> dict[str, float]:
        """Return loss per token, accuracy, and F1 averaged over the labels that occur in rows or predictions."""
        loss, tokens, *flat = totals
        taken_for = torch.tensor(flat).view(len(self.label_tokens), -1)
        right, occurrences = taken_for.diagonal(), taken_for.sum(0) + taken_for.sum(1)
        f1 = (2 * right / occurrences)[occurrences > 0].mean()
        return {"loss": loss / tokens, "accuracy": float(right.sum() / taken_for.sum()), "f1": float(f1)}


def written_label(scores: torch.Tensor, tokens: list[int], label_tokens: list[list[int]]) -> int:
    """Return the index of the label that greedy decoding generates when only labels are allowed.

    If several wrong labels share the generated prefix, the first of them is returned.

    Args:
        scores: Logits at the positions of the true label, (tokens, vocabulary).
        tokens: Token ids of the true label.
        label_tokens: Token ids of each label; no label is a prefix of another.
    """
    possible = list(range(len(label_tokens)))
    for place, right in enumerate(tokens):
        written = max(
            (label_tokens[label][place] for label in possible), key=lambda token: float(scores[place][token])
        )
        possible = [label for label in possible if label_tokens[label][place] == written]
        if written != right:
            break
    return possible[0]
