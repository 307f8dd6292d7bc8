"""The TRL trainer of a run, with our batches, an eval loss weighted by tokens, and checkpoints without what nobody reads."""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import safe_globals
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # Unsloth replaces them here
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from configs.schema import FinetuneConfig
from training import checkpoints
from training.data.batches import (
    EpochDataLoader,
    Order,
    TrainBatches,
    eval_batches,
    with_ends_of_rows,
    without_mask,
)
from training.data.token_files import IGNORED
from training.models import varlen_attention
from training.plan import RunPlan
from training.speed import Throughput

_NOT_LOOKED_AT = datasets.Dataset.from_dict(
    {"input_ids": [[0]]}
)  # TRL asks for rows; ours are dealt out otherwise


def trainer_arguments(plan: RunPlan, output_directory: Path, *, devices: int, eval_first: bool) -> SFTConfig:
    """The plan as TRL's arguments, on so many devices. With DeepSpeed, torch.distributed must be up already."""
    config = plan.config
    return SFTConfig(
        output_dir=str(output_directory),
        max_steps=plan.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size_per_device or config.batch_size,
        gradient_accumulation_steps=config.accumulation_on(devices),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.num_warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        bf16=config.dtype == "bf16",
        use_cpu=plan.device == "cpu",
        # On CUDA accelerate knows it; named, it is refused where Unsloth has one GPU and takes accelerate's process group away.
        ddp_backend="gloo" if plan.device == "cpu" else None,
        ddp_find_unused_parameters=False,
        # Unsloth's own kind is put into the model; with other kernels it means the usual one.
        gradient_checkpointing=bool(config.gradient_checkpointing)
        and not (config.gradient_checkpointing == "unsloth" and plan.resolved.kernels.provider == "unsloth"),
        deepspeed=plan.deepspeed,
        eval_strategy="no",  # the schedule callback asks for evaluation and checkpoints
        save_strategy="no",
        eval_on_start=eval_first,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_on_each_node=True,
        report_to=[],  # the tracking callback does
        run_name=plan.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        torch_empty_cache_steps=None,  # Unsloth's own default would empty it at all micro-batches of some steps
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


@dataclass(frozen=True)
class TrainingRows:
    """What is trained and evaluated, and how it becomes batches."""

    order: Order
    """Which sequences each step takes."""
    train: Dataset[dict[str, Any]]
    """What `order` deals out; PADDING_ROW is in it, too."""
    valid: Dataset[dict[str, Any]] | None
    """What is evaluated, if anything."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    longest: int = 0
    """Which training sequence has most tokens."""


def collate_rows(
    pad_token_id: int, multiple: int | None, *, packed: bool, attention: str | None, masked: bool
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Rows or packs as batches.

    Args:
        pad_token_id: Fills them up.
        multiple: See `pad_to_multiple_of`.
        packed: Sequences hold several rows.
        attention: The model's kind, as transformers calls it. Flash kernels tell packed rows apart in one long sequence only, the
            others in any.
        masked: Batches of rows have an attention mask.
    """
    in_one_line = packed and attention in ("flash_attention_2", varlen_attention.NAME)
    collator = DataCollatorForLanguageModeling(
        pad_token_id,
        pad_to_multiple_of=multiple,
        padding_free=in_one_line,
        return_position_ids=packed,
    )
    if in_one_line:
        return with_ends_of_rows(without_mask(collator))
    return collator if masked and not packed else without_mask(collator)


class FineTuningTrainer(SFTTrainer):
    """SFTTrainer over prepared tokens."""

    def __init__(
        self,
        *,
        config: FinetuneConfig,
        base_model: str,
        rows: TrainingRows,
        model: Any,
        args: SFTConfig,
        tokenizer: Any,
        callbacks: list[TrainerCallback],
        throughput: Throughput,
        on_eval_progress: Callable[[float], None],
        loss_of_transformers: bool,
    ):
        """See SFTTrainer.

        Args:
            config: The YAML.
            base_model: What saved adapters call the model below them: hub id, directory or URI.
            rows: What is trained and evaluated.
            model: Ready to train, its adapter on it.
            args: From `trainer_arguments`.
            tokenizer: Saved beside each checkpoint.
            callbacks: See callbacks.py; `throughput` stands among them.
            throughput: Says how fast each step was.
            on_eval_progress: Told how much of an evaluation is done, 0 to 1.
            loss_of_transformers: TRL's loss is a Triton kernel; where there is no GPU, take the model's own.
        """
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(
            model=model,
            args=args,
            data_collator=rows.collate,
            train_dataset=_NOT_LOOKED_AT,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # TRL rounds the adapter on a 4-bit base to bf16; one that comes from a checkpoint would not be, and train otherwise.
        for parameter, data in trained.items():
            if parameter.dtype != data.dtype:
                parameter.data = data
        self.config = config
        self.base_model = base_model
        self.rows = rows
        self.throughput = throughput
        self.clock = throughput.clock
        self.on_eval_progress = on_eval_progress
        self.loss_of_transformers = loss_of_transformers

    def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **keywords)
        self.accelerator.backward = self.clock.timed("backward", self.accelerator.backward)
        if self.is_deepspeed_enabled:  # it takes the optimizer's step inside of the backward pass
            engine: Any = self.model_wrapped
            engine.step = self.clock.timed("optimizer", engine.step)
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and how many tokens are trained in them on all workers.

        As transformers does it: Unsloth, which replaces that, sends counts between workers that are still on the CPU, as our batches
        are, and NCCL takes no such.
        """

        def get() -> Any:
            batches = list(itertools.islice(epoch_iterator, num_batches))
            return batches, self._get_num_items_in_batch(batches, device)

        return self.clock.timed("data", get)()

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch; behind the last of a step comes the optimizer."""
        loss = self.clock.timed("forward", super().training_step)(*arguments, **keywords)
        if self.accelerator.sync_gradients:
            self.clock.enter("optimizer")
        return loss

    def rehearse(self) -> None:
        """Forward and backward pass of the largest batch that can come: what it needs is missing now, or never.

        Nothing of it is left: random states are as before, gradients are dropped, no worker sends another any, and neither loss nor
        counts hear of it. DeepSpeed could not forget it, since it adds each backward pass to its own sums.
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
        """Adds how fast the step was."""
        # TRL's count takes a batch without a mask for one row, and begins at 0 in a run that goes on; `figures_of_step` has better.
        self._metrics["train"].pop("num_tokens", None)
        if "loss" in logs:
            logs |= self.throughput.figures_of_step()
        super().log(logs, start_time)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss a trained token: of all workers together in training, of this batch in evaluation."""
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # 0, not no number, where nothing is trained
        if self.loss_of_transformers:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_train_dataloader(self) -> EpochDataLoader:
        """This worker's micro-batches; not prepared by accelerate, which would deal rows twice in an uneven epoch."""
        # Its own generator: drawing a base seed from the global one would tie dropout to how often we iterate.
        return EpochDataLoader(
            self.rows.train,
            batch_sampler=TrainBatches(self.rows.order, rank=self.args.process_index),
            collate_fn=self.rows.collate,
            pin_memory=not self.args.use_cpu,
            generator=torch.Generator(),
        )

    def sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """What is added up over all batches of an evaluation: here the loss and the trained tokens, as float64."""
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        # For padding as well: workers wait for each other in it.
        mean = self.compute_loss(model, dict(inputs))
        if count == 0:
            return torch.zeros(2, dtype=torch.float64, device=self.args.device)
        return torch.stack([mean.double() * count, count.double()])

    def figures(self, totals: list[float]) -> dict[str, float]:
        """The sums over all batches and workers as what is reported: `loss` and what stands beside it."""
        return {"loss": totals[0] / totals[1]}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            page_states(self.optimizer)

    def _evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        return self.clock.timed("evaluation", super()._evaluate)(*arguments, **keywords)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Eval loss and figures from sums over all workers: the loss is that of a trained token.

        They do not depend on the number of workers, the batch size or how rows are padded or packed.
        """
        del arguments, keywords
        if self.rows.valid is None:
            return {}
        totals = self.added_up(self.rows.valid, self.sums, self.on_eval_progress)
        metrics = {f"eval_{name}": value for name, value in self.figures(totals.tolist()).items()}
        self._metrics["eval"].clear()  # TRL's own averages are over batches, not tokens
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def added_up(
        self,
        sequences: Any,
        sums: Callable[[Any, dict[str, Any]], torch.Tensor],
        on_progress: Callable[[float], None],
    ) -> torch.Tensor:
        """The sums of all batches of all workers, without gradients or dropout."""
        mine = eval_batches(
            len(sequences),
            self.args.per_device_eval_batch_size,
            self.args.world_size,
            self.args.process_index,
        )
        model = self.model_wrapped
        assert model is not None
        was_training = model.training
        model.eval()
        parts = []
        with torch.no_grad():
            for position, batch in enumerate(mine, start=1):
                inputs = self._prepare_inputs(self.rows.collate([sequences[index] for index in batch]))
                with self.compute_loss_context_manager():
                    parts.append(sums(model, inputs))
                on_progress(position / len(mine))
        model.train(was_training)
        return self.of_all_workers(torch.stack(parts).sum(0))

    def of_all_workers(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum over workers, on each of them."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's random states; where the checkpoint has none, since it was saved on other ranks, such as follow from it."""
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
            self.clock.timed("saving", Trainer._save_checkpoint)(
                self, model, trial
            )  # without TRL's model card
            adapter = directory / "adapter_config.json"
            if self.args.should_save and adapter.exists():
                write_same_everywhere(adapter, self.base_model)


def base_of(model: Any) -> Any:
    """What lies below an adapter; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def write_same_everywhere(adapter_config: Path, base_model: str) -> None:
    """Take out of PEFT's file what differs between equal runs: where the base lay on this node, and the order of a process's sets."""
    settings = json.loads(adapter_config.read_text("utf-8")) | {"base_model_name_or_path": base_model}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(name), list):
            settings[name].sort()
    adapter_config.write_text(json.dumps(settings, indent=2), "utf-8")


def page_states(optimizer: Any) -> None:
    """A restored paged optimizer's states where those of a new one lie: in pages that leave a GPU whose memory runs out.

    bitsandbytes loads them into plain memory, and takes it for pages all the same.
    """
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    if not getattr(unwrapped, "is_paged", False):
        return
    for parameter, states in unwrapped.state.items():
        for name in states.keys() & {"state1", "state2"}:
            pages = unwrapped.get_state_buffer(parameter, dtype=states[name].dtype)
            states[name] = pages.copy_(states[name])


def has_random_states(checkpoint: Path, rank: int, world_size: int) -> bool:
    """Whether a checkpoint on this node holds what transformers restores for a rank of so many."""
    return random_states(checkpoint, rank, world_size).is_file()


def random_states(checkpoint: Path, rank: int, world_size: int) -> Path:
    """Where transformers keeps a rank's."""
    return checkpoint / (f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth")


def note_device(file: Path, device: int) -> None:
    """Beside the states of all GPUs that a rank sees stands which of them was its own: on other nodes it may be another."""
    with safe_globals():
        states = torch.load(file, weights_only=True)
    torch.save(states | {"own_device": device}, file)


def state_of_noted_device(file: Path) -> torch.Tensor | None:
    """Of the GPU that was a rank's own; None where that was not noted."""
    with safe_globals():
        states = torch.load(file, weights_only=True)
    return states["cuda"][states["own_device"]] if "own_device" in states else None


def seed_of_new_rank(seed: int, step: int, rank: int) -> int:
    """Where the random states of a rank that had none at a step begin: always alike, and otherwise for every rank and step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


class ClassificationTrainer(FineTuningTrainer):
    """Reports how often the label that the model would write is the right one."""

    def __init__(self, *, label_tokens: list[list[int]], **arguments: Any):
        """See FineTuningTrainer.

        Args:
            label_tokens: The tokens of each label.
            arguments: FineTuningTrainer's.
        """
        super().__init__(**arguments)
        self.label_tokens = label_tokens
        self._may_leave_out_logits = (
            "logits_to_keep" in signature(base_of(arguments["model"]).forward).parameters
        )

    def sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss, the trained tokens, and how often each label (row) was taken for each (column)."""
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        is_label = inputs["labels"][:, 1:] != IGNORED
        tokens = inputs["labels"][:, 1:][is_label]
        # From the first label on: accelerate turns what the model gives back to fp32, and logits of all tokens are gigabytes.
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
        """The loss a token, the accuracy, and F1 as the mean over the labels that occur, in the rows or in the answers."""
        loss, tokens, *flat = totals
        taken_for = torch.tensor(flat).view(len(self.label_tokens), -1)
        right, occurrences = taken_for.diagonal(), taken_for.sum(0) + taken_for.sum(1)
        f1 = (2 * right / occurrences)[occurrences > 0].mean()
        return {"loss": loss / tokens, "accuracy": float(right.sum() / taken_for.sum()), "f1": float(f1)}


def written_label(scores: torch.Tensor, tokens: list[int], label_tokens: list[list[int]]) -> int:
    """The label that a model writes when it may write nothing but labels, always the likeliest token.

    Where it leaves the right label for several that begin alike, the first of them is taken: all of them are wrong.

    Args:
        scores: Of every token at each of the right label's tokens, (tokens, vocabulary).
        tokens: Of the right label.
        label_tokens: Of each label; none is the beginning of another.
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
