"""FinetuneConfig: everything a run is told, key by key.

The docstring under each field is its help text and its description in the JSON schema. A field is checked
alone by its type; what only shows when keys are seen together is in `_conflicts`, at the end of this file.
"""

import hashlib
import json
import math
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

DEFAULT_MIN_UPDATE_STEPS = 100
"""Optimizer steps a run makes at least when the YAML says nothing about its length."""

LENGTH_KEYS = ("num_epochs", "max_steps", "min_update_steps")
"""Each says how long a run is, so a YAML has one of them."""

DEEPSPEED_DIRECTORY = Path(__file__).parent / "deepspeed"

DeepspeedPreset = Literal["zero_1", "zero_2", "zero_3", "zero_3_offload_optim", "zero_3_offload_optim+param"]
"""The names of the files in configs/deepspeed/."""

DEEPSPEED_PRESETS: tuple[DeepspeedPreset, ...] = get_args(DeepspeedPreset)

# Names that change nothing about the weights a run ends with.
NOT_IN_HASH = {
    "resume",
    "worker_resources",
    "trainer_resources",
    "num_checkpoints_to_keep",
    "storage_path",
    "run_name",
    "output_dir",
    "max_failures",
    "logger",
    "export",
}


class ConflictError(ValueError):
    """Values that are each valid but not together.

    Attributes:
        conflicts: (key relative to the section that was checked, what is wrong and what to do).
    """

    def __init__(self, conflicts: list[tuple[str, str]]):
        super().__init__("; ".join(text for _, text in conflicts))
        self.conflicts = conflicts


def _uri(*schemes: str) -> AfterValidator:
    """Accepts a local path, or a URI of one of these schemes."""

    def check(value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if separator and scheme not in schemes:
            known = ", ".join(f"{known}://" for known in schemes)
            raise ValueError(f"{scheme}:// is not supported: write one of {known}, or a local path")
        if separator and not rest:
            raise ValueError(f"nothing follows {scheme}://: write the whole address")
        if scheme == "hf" and separator and not re.match(r"datasets/[^/?]+/[^/?]+", rest):
            raise ValueError("a hub dataset is written hf://datasets/ORG/NAME/CONFIG?split=train")
        return value

    return AfterValidator(check)


def _bytes(value: str) -> int:
    """`50GiB` -> 53687091200."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?i?B)", value.strip(), re.IGNORECASE)
    if match is None:
        raise ConflictError(
            [("memory", "`memory` is a number of bytes, or text such as 50GiB, 50GB or 512MiB")]
        )
    return int(float(match[1]) * units[match[2].upper()])


def _memory_in_bytes(resources: object) -> object:
    if isinstance(resources, dict) and isinstance(resources.get("memory"), str):
        return {**resources, "memory": _bytes(resources["memory"])}
    return resources


Text = Annotated[str, Field(min_length=1)]
_BUCKETS = ("s3", "gs", "az", "abfs")
UriKind = Literal["model", "data", "storage"]


@dataclass(frozen=True)
class _UriMark:
    """Marks a type as a URI, so that `uri_fields` finds the fields that have it."""

    kind: UriKind


ModelUri = Annotated[Text, _uri(*_BUCKETS, "file"), _UriMark("model")]
DataUri = Annotated[Text, _uri(*_BUCKETS, "hf", "file"), _UriMark("data")]
StorageUri = Annotated[Text, _uri(*_BUCKETS, "file"), _UriMark("storage")]
PositiveInt = Annotated[int, Field(gt=0)]
ACCELERATOR = "accelerator_type:"
"""What the names of Ray's resources for kinds of GPUs begin with."""

Resources = Annotated[
    dict[Text, Annotated[int | float, Field(ge=0)]],
    BeforeValidator(_memory_in_bytes),
    Field(json_schema_extra={"properties": {"memory": {"type": ["number", "string"]}}}),
]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Column = Literal[
    "messages",
    "conversations",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "label",
    "chosen",
    "rejected",
]
DataFormat = Literal[
    "messages",
    "conversations",
    "prompt_completion",
    "instruction",
    "text",
    "preference",
    "classification",
]
"""How rows are written; docs of each stand at `data_format`."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not coerced, and nothing changes
    afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class LoraConfig(Section):
    """The fields of PEFT's LoraConfig that are plain data and leave the base weights as they are."""

    r: PositiveInt = 8
    """Rank of the adapter."""

    lora_alpha: PositiveInt = 16
    """Scale: the adapter's output is multiplied by lora_alpha / r."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. Anything but 0 turns Unsloth's fused LoRA kernels off."""

    target_modules: list[Text] | Text | None = "all-linear"
    """Modules that get an adapter: names, one regular expression, `all-linear`, or null for the
    architecture's usual ones."""

    exclude_modules: list[Text] | Text | None = None
    """Modules that get none although target_modules matches them: names, or one regular expression."""

    target_parameters: list[Text] | None = None
    """Names of parameters (not modules) that get an adapter, such as the experts of a mixture."""

    modules_to_save: list[Text] | None = None
    """Modules trained in full beside the adapter and saved with it."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""

    use_dora: bool = False
    """Train magnitude and direction apart (DoRA)."""

    lora_bias: bool = False
    """Give the adapter's second matrix a bias."""

    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How the adapter starts; true: as no change at all. The ways that rewrite the base weights (PiSSA,
    OLoRA, LoftQ, ...) are left out: their adapters do not load on the base model that everybody else has."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the layers that get an adapter; null: all. Needs target_modules as a list."""

    layers_pattern: list[Text] | Text | None = None
    """Name of the model's list of layers, where it is not found by itself."""

    rank_pattern: dict[Text, PositiveInt] = {}
    """Module name or regular expression -> its own r."""

    alpha_pattern: dict[Text, PositiveInt] = {}
    """Module name or regular expression -> its own lora_alpha."""

    trainable_token_indices: list[int] | dict[Text, list[int]] | None = None
    """Token ids whose embeddings are trained, without training the whole embedding."""

    ensure_weight_tying: bool = False
    """Keep tied embeddings tied when one of them is trained."""

    fan_in_fan_out: bool = False
    """True for layers that hold their weight as (in, out), such as GPT-2's Conv1D."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Only causal language models are trained here."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = []
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            conflicts.append(
                ("layers_to_transform", "`layers_to_transform` needs `target_modules` as a list of names")
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            conflicts.append(
                ("layers_pattern", "`layers_pattern` needs `layers_to_transform`: add it, or leave it out")
            )
        if self.lora_bias and self.use_dora:
            conflicts.append(("lora_bias", "`lora_bias` and `use_dora` do not go together: choose one"))
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            conflicts.append(("lora_bias", "`lora_bias` needs `init_lora_weights: true`"))
        if conflicts:
            raise ConflictError(conflicts)
        return self


class DeepspeedFile(Section):
    """A DeepSpeed configuration of your own."""

    config_path: Text
    """JSON file, relative to the directory the command is run in. It needs no optimizer and no scheduler
    block: those come from this YAML."""


class DeviceRange(Section):
    """Ray Train workers of a run that goes on with fewer when nodes are lost, and with more when they come back."""

    min: PositiveInt
    """Fewest workers that it trains on; with fewer it waits."""

    max: PositiveInt
    """Most workers that it trains on, and what train_batch_size_per_device and gradient_accumulation_steps are meant for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ConflictError([("max", f"`max` is {self.max}, and `min` is {self.min}: exchange them")])
        if self.min == self.max:  # two spellings of one run would be two runs, by their hashes
            raise ConflictError(
                [
                    (
                        "max",
                        f"`max` and `min` are both {self.max}, which is no range: write `num_devices: {self.max}`",
                    )
                ]
            )
        return self


class CheckpointFrequency(Section):
    """How often a checkpoint is written and the validation set is run."""

    unit: Literal["epochs", "steps"] = "epochs"
    """What frequency counts: passes over the data, or optimizer steps."""

    frequency: PositiveInt = 1
    """Every how many of them."""


class PreferenceTuningConfig(Section):
    """Settings of `task: preference_tuning`."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the reference model; for orpo, how much the odds count beside the likelihood."""

    loss: Literal["dpo", "ipo", "orpo", "kto"] = "dpo"
    """The preference loss. dpo, ipo and kto compare with what the run starts from, orpo with nothing."""


class ClassifierConfig(Section):
    """Settings of `task: classification`."""

    label_tokens: Annotated[list[Text], Field(min_length=2)]
    """The labels, as the assistant's last message spells them; each becomes a token of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.label_tokens)) != len(self.label_tokens):
            raise ConflictError([("label_tokens", "`label_tokens` names a label twice: keep each once")])
        return self


class DataSource(Section):
    """One of several sources of rows."""

    path: DataUri
    """File, directory or prefix, glob, or hub dataset."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's rows, relative to the other sources' weights; null for all: every row once."""


class WandbLogger(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY in the environment."""

    provider: Literal["wandb"]
    """Where metrics also go."""

    project: Text | None = None
    """Project; null: W&B's default."""

    entity: Text | None = None
    """User or team; null: the key's own."""

    group: Text | None = None
    """Group that the run is listed under."""

    tags: list[Text] = []
    """Tags of the run."""


class MlflowLogger(Section):
    """MLflow; credentials come from MLFLOW_* (or DATABRICKS_*) in the environment."""

    provider: Literal["mlflow"]
    """Where metrics also go."""

    tracking_uri: Text | None = None
    """Tracking server; null: MLFLOW_TRACKING_URI."""

    experiment_name: Text | None = None
    """Experiment, made when it does not exist; null: MLflow's default."""

    tags: dict[Text, str] = {}
    """Tags of the run."""


class TensorboardLogger(Section):
    """TensorBoard event files, kept beside the run's metrics."""

    provider: Literal["tensorboard"]
    """Where metrics also go."""


class ExportConfig(Section):
    """What is made of the best checkpoint once the run is completed, as `main.py export` makes it."""

    merge: bool = True
    """true: one model, an adapter merged into its base model's 16-bit weights; false: the adapter alone, as vLLM loads it."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """How the weights of the model are written; an adapter keeps its own."""

    to: StorageUri | None = None
    """Bucket prefix or directory of its own; null: exports/ in the run."""

    gguf: bool = False
    """Write a GGUF file beside it; needs llama.cpp's convert_hf_to_gguf.py on the PATH."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gguf and not self.merge:
            raise ConflictError(
                [("gguf", "`gguf` is made of a whole model: write `merge: true`, or leave `gguf` out")]
            )
        return self


DataPaths = DataUri | Annotated[list[DataUri | DataSource], Field(min_length=1)]


def _sources(paths: DataPaths | None) -> tuple[DataSource, ...]:
    listed = paths if isinstance(paths, list) else [paths] if paths else []
    return tuple(item if isinstance(item, DataSource) else DataSource(path=item) for item in listed)


class FinetuneConfig(Section):
    """One fine-tuning run."""

    model_id: ModelUri
    """Model to train: a hub id, a local directory, or an s3:// prefix."""

    initial_base_model_ckpt_path: ModelUri | None = None
    """Full weights to start from instead of model_id's: s3:// prefix, local directory, a run's URI, or
    run:NAME in the same storage_path (its best checkpoint is taken). Weights only."""

    initial_adapter_model_ckpt_path: ModelUri | None = None
    """LoRA adapter to go on training: s3:// prefix, local directory, a run's URI, or run:NAME in the same
    storage_path (its best checkpoint is taken). Weights only; without lora_config the adapter keeps its
    shape."""

    resume: Literal["auto", "never"] = "auto"
    """auto: a run that has committed checkpoints goes on exactly where the newest one stands."""

    resume_from_checkpoint: ModelUri | None = None
    """Another run's checkpoint whose whole state a new run takes: weights, optimizer, schedule, random
    state and position in the data."""

    task: Literal["instruction_tuning", "causal_lm", "preference_tuning", "classification"] = (
        "instruction_tuning"
    )
    """instruction_tuning: loss on the assistant's turns only; causal_lm: on every token; preference_tuning:
    chosen against rejected; classification: on the label only."""

    train_path: DataPaths
    """Training rows: JSONL, JSON or CSV, also as .gz or .zst, or Parquet. One place (a file, a directory or prefix, a glob;
    s3://, local, or hf://datasets/ORG/NAME/CONFIG?split=train[50%:]), a list of them, or a list of
    `{path: ..., weight: ...}`: an epoch then has as many rows as all sources together, dealt out by weight."""

    valid_path: DataPaths | None = None
    """Validation rows, as train_path (without weights); null: no evaluation, and the newest checkpoint is the best one."""

    data_format: Literal["auto"] | DataFormat = "auto"
    """How rows are written. messages: chats of role and content (`tools`, `tool_calls`, `weight: 0`); conversations:
    ShareGPT's from and value; prompt_completion; instruction: with input and output; text: as it is, for causal_lm;
    preference: chosen and rejected, with or without prompt; classification: text and label. auto: by their columns."""

    columns: dict[Column, Text] = {}
    """What the files call a column: `{prompt: question, completion: answer}`."""

    bad_rows: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be learned from. error: they are named and nothing is trained; skip: they are
    left out, counted, and listed in the run's skipped_rows.jsonl."""

    chat_template: Text | None = None
    """Jinja template that lays out conversations, inline or as a file's path; null: the model's own."""

    prompt_template: Text | None = None
    """Lays out rows without a chat template: text with {column} places, the answer's last, such as
    `"### Instruction: {instruction} ### Response: {output}"`; the loss is on the answer and the end of text."""

    context_length: PositiveInt | None = None
    """Tokens of the longest row that is trained on; null: the longest row there is, at most what the model
    takes."""

    long_rows: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to rows longer than context_length, once they are counted."""

    padding: Literal["longest", "max_length"] = "longest"
    """longest: a step takes rows that are about equally long, and a batch is padded to its longest row; max_length: always
    to context_length (the worst case, for profiling)."""

    packing: bool = False
    """Lay several rows into one sequence of context_length tokens (null: of the longest row), without letting them see one
    another. Batch sizes count these sequences then."""

    num_devices: PositiveInt | DeviceRange = 1
    """Ray Train workers, one device each. `{min: 1, max: 2}`: as many of them as the cluster has nodes for. A step takes the same
    rows then, whatever their number: with fewer than max, each accumulates more batches, and counts that cannot share them
    equally are passed over."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU for each worker where the cluster has any, else CPU."""

    worker_resources: Resources = {}
    """Ray resources of each worker, such as `accelerator_type:A10G: 0.001`; memory in bytes or as 50GiB."""

    trainer_resources: Resources = {}
    """Accepted for older files; Ray Train's controller takes no resources."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows. Say one of num_epochs, max_steps and min_update_steps."""

    max_steps: PositiveInt | None = None
    """Optimizer steps, whatever that is in epochs."""

    min_update_steps: PositiveInt | None = None
    """As many whole epochs as it takes to make at least this many optimizer steps; 100 when none of the
    three is given."""

    train_batch_size_per_device: PositiveInt | Literal["auto"] = 1
    """Rows a device takes at once; auto: the most of train_batch_size that are estimated to fit."""

    train_batch_size: PositiveInt | None = None
    """For `train_batch_size_per_device: auto`, rows of an optimizer step over all devices: as many batches are accumulated as
    that takes, so that what is learned does not depend on a device's memory."""

    eval_batch_size_per_device: PositiveInt | None = None
    """Rows a device evaluates at once; null: as train_batch_size_per_device."""

    gradient_accumulation_steps: PositiveInt = 1
    """Batches a device adds up before one optimizer step."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate. About 1e-4 for LoRA, 1e-5 for full-parameter training."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = (
        "cosine"
    )
    """Course of the learning rate after the warm-up."""

    num_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0: never."""

    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_8bit",
        "adafactor",
        "sgd",
    ] = "adamw_torch_fused"
    """Optimizer, by transformers' names."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of data order, dropout and new weights."""

    kernels: Literal["auto", "unsloth", "liger", "torch"] = "auto"
    """Whose kernels train the model; auto prints what it chose and why."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """bf16: mixed precision, with LoRA's frozen base held in bf16; fp32: everything in fp32."""

    load_in_4bit: bool = False
    """Hold the frozen base weights in 4 bits (QLoRA)."""

    deterministic: bool = False
    """Only operations that give the same bits every time: without it a GPU may round a continued run otherwise, by an order of
    sums. Costs some speed; on CPU it is so anyway."""

    flash_attention_2: bool = False
    """Use the flash-attn package; false: PyTorch's own attention. Unsloth's kernels take it wherever it is installed."""

    gradient_checkpointing: bool | Literal["unsloth"] = True
    """Compute activations again in the backward pass instead of keeping them; unsloth: also offload them."""

    deepspeed: DeepspeedPreset | DeepspeedFile | None = None
    """ZeRO: a preset's name, or `{config_path: FILE}`; null: plain data parallelism."""

    lora_config: LoraConfig | None = None
    """Train a LoRA adapter; null: full-parameter training, unless initial_adapter_model_ckpt_path brings
    one."""

    preference_tuning_config: PreferenceTuningConfig | None = None
    """Settings of task preference_tuning; null: its defaults."""

    classifier_config: ClassifierConfig | None = None
    """Settings of task classification, which needs them."""

    checkpoint_and_evaluation_frequency: CheckpointFrequency = CheckpointFrequency()
    """How often to checkpoint and evaluate."""

    eval_first: bool = True
    """Report the evaluation loss before the first step (where there is a valid_path)."""

    num_checkpoints_to_keep: PositiveInt = 1
    """Checkpoints kept, best by evaluation loss; the newest is always kept too."""

    storage_path: StorageUri | None = None
    """Bucket prefix that runs are kept under; null: $ANYSCALE_ARTIFACT_STORAGE, else /mnt/cluster_storage where it
    exists, else the embedded bucket."""

    run_name: RunName | None = None
    """Name of the run under storage_path; null: made from the YAML's name and what is in it, so that the same
    command continues the same run."""

    output_dir: Text | None = None
    """Scratch directory on each node; null: /mnt/local_storage where it exists, else the user's cache directory."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Gated models take HF_TOKEN from the environment."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a run is started again after a worker or a node is lost."""

    logger: (
        Annotated[WandbLogger | MlflowLogger | TensorboardLogger, Field(discriminator="provider")] | None
    ) = None
    """Where metrics go besides the run's own metrics.jsonl."""

    export: ExportConfig | None = None
    """Export the best checkpoint once the run is completed: `{merge: true, dtype: bf16, to: s3://...}`; null: not by itself."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = list(_conflicts(self))
        if conflicts:
            raise ConflictError(conflicts)
        return self

    @property
    def batch_size(self) -> int:
        """train_batch_size_per_device of a configuration in which it is a number, as it is in every plan."""
        assert self.train_batch_size_per_device != "auto"
        return self.train_batch_size_per_device

    @property
    def most_devices(self) -> int:
        """num_devices, or the end of its range."""
        return self.num_devices.max if isinstance(self.num_devices, DeviceRange) else self.num_devices

    @property
    def fewest_devices(self) -> int:
        """num_devices, or the beginning of its range."""
        return self.num_devices.min if isinstance(self.num_devices, DeviceRange) else self.num_devices

    @property
    def device_counts(self) -> tuple[int, ...]:
        """The numbers of workers that it may train on, ascending: those that can share a step's batches equally."""
        batches = self.most_devices * self.gradient_accumulation_steps
        return tuple(
            devices for devices in range(self.fewest_devices, self.most_devices + 1) if batches % devices == 0
        )

    def accumulation_on(self, devices: int) -> int:
        """Batches that each device adds up before an optimizer step, so that the step takes the same rows on any number of them.

        Args:
            devices: one of device_counts.
        """
        return self.most_devices * self.gradient_accumulation_steps // devices

    def possible_batch_sizes(self) -> Iterator[int]:
        """What `train_batch_size_per_device: auto` may come to, descending: each number of devices shares a step's batches equally."""
        assert self.train_batch_size is not None
        share = self.train_batch_size // self.most_devices
        for rows in range(share, 0, -1):
            if share % rows == 0 and (self.train_batch_size // rows) % self.fewest_devices == 0:
                yield rows

    def with_batch_size(self, rows: int) -> Self:
        """What `train_batch_size_per_device: auto` comes to: the same rows a step, `rows` of them on a device at once.

        Args:
            rows: one of possible_batch_sizes.
        """
        assert self.train_batch_size is not None
        accumulated = self.train_batch_size // (self.most_devices * rows)
        said = self.model_dump(exclude_unset=True) | {
            "train_batch_size_per_device": rows,
            "gradient_accumulation_steps": accumulated,
            "train_batch_size": None,
        }
        return self.model_validate(said)

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """train_path as a list of sources."""
        return _sources(self.train_path)

    @property
    def valid_sources(self) -> tuple[DataSource, ...]:
        """valid_path as a list of sources; empty when there is none."""
        return _sources(self.valid_path)

    @property
    def trains_adapter(self) -> bool:
        """True for LoRA, new or continued; false for full-parameter training."""
        return self.lora_config is not None or self.initial_adapter_model_ckpt_path is not None

    def number_of_epochs(self, steps_per_epoch: int) -> float | None:
        """Epochs to train; None when max_steps decides.

        Args:
            steps_per_epoch: optimizer steps that one pass over the training rows makes, at least 1.
        """
        if self.max_steps is not None:
            return None
        if self.num_epochs is not None:
            return self.num_epochs
        return float(math.ceil((self.min_update_steps or DEFAULT_MIN_UPDATE_STEPS) / steps_per_epoch))


def config_hash(config: FinetuneConfig) -> str:
    """64 hex digits that are equal for configurations that train the same.

    Where a run is stored, what it is called, how it is logged, retried and placed are left out. Files are
    known by their names only: what is in the data or in a DeepSpeed file of one's own is not looked at.
    """
    said = config.model_dump(mode="json", exclude=NOT_IN_HASH)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def deepspeed_preset_path(preset: DeepspeedPreset) -> Path:
    """The JSON file of a preset."""
    return DEEPSPEED_DIRECTORY / f"{preset}.json"


def _deepspeed_name(deepspeed: DeepspeedPreset | DeepspeedFile | None) -> str:
    if isinstance(deepspeed, DeepspeedFile):
        return Path(deepspeed.config_path).name.lower()
    return deepspeed or ""


def _conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    """What only shows when keys are seen together: (key, what is wrong and what to do)."""
    yield from _start_conflicts(config)
    yield from _length_conflicts(config)
    yield from _batch_conflicts(config)
    yield from _task_conflicts(config)
    yield from _data_conflicts(config)
    yield from _device_conflicts(config)
    yield from _range_conflicts(config)
    yield from _precision_conflicts(config)
    yield from _deepspeed_conflicts(config)
    if config.export and not config.export.merge and not config.trains_adapter:
        yield (
            "export.merge",
            "`export.merge: false` exports an adapter, and this run trains the whole model: leave `merge` out",
        )


def _start_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.resume_from_checkpoint is None:
        return
    for key, value in (
        ("initial_adapter_model_ckpt_path", config.initial_adapter_model_ckpt_path),
        ("initial_base_model_ckpt_path", config.initial_base_model_ckpt_path),
    ):
        if value is not None:
            yield (
                key,
                f"`{key}` and `resume_from_checkpoint` both say where the weights come from: keep "
                f"`{key}` to start anew from weights, `resume_from_checkpoint` to take the "
                f"whole trainer state",
            )


def _length_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    given = [key for key in LENGTH_KEYS if getattr(config, key) is not None]
    if len(given) > 1:
        yield (
            given[-1],
            f"{' and '.join(f'`{key}`' for key in given)} each set the run's length: say one of them",
        )
    if config.lr_scheduler_type == "constant" and config.num_warmup_steps > 0:
        yield (
            "num_warmup_steps",
            "`lr_scheduler_type: constant` has no warm-up: write `constant_with_warmup`, or "
            "`num_warmup_steps: 0`",
        )


def _batch_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    rows = config.train_batch_size
    if config.train_batch_size_per_device != "auto":
        if config.fewest_devices not in config.device_counts:
            batches = config.most_devices * config.gradient_accumulation_steps
            usable = [str(count) for count in range(1, config.most_devices) if batches % count == 0]
            yield (
                "num_devices.min",
                f"`num_devices.min` is {config.fewest_devices}, and so many devices cannot share the {batches} batches of a step equally "
                f"(max x gradient_accumulation_steps): write {' or '.join(usable)}, or another `gradient_accumulation_steps`",
            )
        if rows is not None:
            yield (
                "train_batch_size",
                "`train_batch_size` is for `train_batch_size_per_device: auto`: write that, or leave it out (a step takes "
                "train_batch_size_per_device x num_devices x gradient_accumulation_steps rows)",
            )
        return
    if rows is None:
        yield (
            "train_batch_size_per_device",
            "`train_batch_size_per_device: auto` needs `train_batch_size`, the rows of an optimizer step: what is learned would "
            "depend on a device's memory without it",
        )
    for devices in dict.fromkeys((config.fewest_devices, config.most_devices)):
        if rows is not None and rows % devices:
            yield (
                "train_batch_size",
                f"`train_batch_size` is {rows}, which {devices} devices cannot share equally: write a multiple of {devices}",
            )
    if config.gradient_accumulation_steps > 1:
        yield (
            "gradient_accumulation_steps",
            "`gradient_accumulation_steps` follows from `train_batch_size` with `train_batch_size_per_device: auto`: leave it out",
        )


def _task_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.preference_tuning_config is not None and config.task != "preference_tuning":
        yield (
            "preference_tuning_config",
            f"`preference_tuning_config` has no use in `task: {config.task}`: write `task: "
            f"preference_tuning`, "
            "or leave the section out",
        )
    if config.classifier_config is not None and config.task != "classification":
        yield (
            "classifier_config",
            f"`classifier_config` has no use in `task: {config.task}`: write `task: classification`, "
            "or leave the section out",
        )
    if config.task == "classification" and config.classifier_config is None:
        yield (
            "task",
            "`task: classification` needs the labels: add `classifier_config: {label_tokens: [...]}`",
        )
    if config.packing and config.padding == "max_length":
        yield "packing", "`packing` leaves nothing to pad: write `padding: longest`, or `packing: false`"
    if config.packing and config.task in ("preference_tuning", "classification"):
        yield (
            "packing",
            f"`packing` does not work with `task: {config.task}`, which looks at answers one by one: write `packing: false`",
        )
    if config.task == "preference_tuning" and config.kernels == "unsloth":
        yield (
            "kernels",
            "`kernels: unsloth` does not work with `task: preference_tuning`, which compares log-probabilities where "
            "Unsloth's forward pass gives a loss: write `kernels: liger` or `torch`",
        )
    if config.packing and config.kernels == "unsloth":
        yield (
            "packing",
            "`packing` does not work with `kernels: unsloth`, whose attention lets packed rows see one another: "
            "write `kernels: liger` or `torch`, or `packing: false`",
        )


def _data_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    weighted = [source.weight is not None for source in config.train_sources]
    if any(weighted) and not all(weighted):
        yield "train_path", "`train_path` has a weight for some sources only: write one for each, or none"
    if any(source.weight is not None for source in config.valid_sources):
        yield (
            "valid_path",
            "`valid_path` has weights, but each validation row is evaluated once: leave them out",
        )
    if config.prompt_template is not None:
        if config.chat_template is not None:
            yield "prompt_template", "`prompt_template` and `chat_template` both lay out rows: keep one"
        if fault := _prompt_template_fault(config.prompt_template):
            yield "prompt_template", fault
        if config.task in ("preference_tuning", "classification"):
            yield (
                "prompt_template",
                f"`prompt_template` does not work with `task: {config.task}`: leave it out",
            )
    if config.data_format == "preference" and config.task != "preference_tuning":
        yield "data_format", "`data_format: preference` is for `task: preference_tuning`: write that task too"
    if config.task == "preference_tuning" and config.data_format not in ("auto", "preference"):
        yield (
            "data_format",
            f"`data_format: {config.data_format}` has no pairs for `task: preference_tuning`: write `preference`",
        )
    if config.data_format == "text" and config.task != "causal_lm":
        yield "data_format", "`data_format: text` has no answer to train on: write `task: causal_lm`"
    if config.data_format == "classification" and config.task != "classification":
        yield (
            "data_format",
            "`data_format: classification` is for `task: classification`: write that task too",
        )


def _prompt_template_fault(template: str) -> str | None:
    """Why rows cannot be laid out by it, if they cannot."""
    braces = "write {{ and }} for braces that are text, and {column} for a place"
    try:
        places = [parts[1:] for parts in string.Formatter().parse(template) if parts[1] is not None]
    except ValueError as error:
        return f"`prompt_template` cannot be read ({error}): {braces}"
    names = [str(name) for name, _, _ in places]
    for name, form, conversion in places:
        if form or conversion or not re.fullmatch(r"\w*[^\W\d]\w*", str(name)):
            return f"`prompt_template` has a place that names no column ({{{name}…}}): {braces}"
    if len(names) < 2 or not template.rstrip().endswith(f"{{{names[-1]}}}"):
        return (
            "`prompt_template` needs at least two {column} places and ends with the answer's: write something "
            'like "### Instruction: {instruction} ### Response: {output}"'
        )
    if names[-1] in names[:-1]:
        return f"`prompt_template` has the answer's place `{names[-1]}` twice: keep the one at its end"
    return None


def _device_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    gpus = config.worker_resources.get("GPU")
    key = "worker_resources.GPU"
    if gpus is not None and gpus > 1:
        yield key, f"`{key}` is {gpus}, but a worker has one device: write `GPU: 1` and raise `num_devices`"
    if gpus == 0 and config.device == "cuda":
        yield key, f"`{key}` is 0 with `device: cuda`: leave `GPU` out, or write `device: cpu`"
    if gpus and config.device == "cpu":
        yield key, f"`{key}` is {gpus} with `device: cpu`: leave `GPU` out, or write `device: cuda`"
    named = [name for name in config.worker_resources if name.startswith(ACCELERATOR)]
    if len(named) > 1:
        yield (
            "worker_resources",
            f"`worker_resources` asks for {' and '.join(named)}, and a node has one of them: write one, on the command line as "
            "`worker_resources='{accelerator_type:NAME: 0.001}'`",
        )
    for name in named:
        if name == ACCELERATOR or config.worker_resources[name] > 1:
            yield (
                f"worker_resources.{name}",
                "an accelerator is asked for by a name, and Ray gives a node 1 of it: write "
                "`accelerator_type:A10G: 0.001`",
            )
    if config.kernels == "liger" and config.device == "cpu":
        yield "kernels", "`kernels: liger` needs a GPU: write `kernels: auto` or `torch` with `device: cpu`"


def _precision_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.load_in_4bit and not config.trains_adapter:
        yield (
            "load_in_4bit",
            "`load_in_4bit` cannot be trained full-parameter: add `lora_config` "
            "(or `initial_adapter_model_ckpt_path`), or write `load_in_4bit: false`",
        )
    if config.dtype == "fp32" and config.flash_attention_2:
        yield (
            "flash_attention_2",
            "`flash_attention_2` computes in bf16 only: write `dtype: bf16`, or leave it out",
        )
    if config.gradient_checkpointing == "unsloth" and config.kernels not in ("unsloth", "auto"):
        yield (
            "gradient_checkpointing",
            f"`gradient_checkpointing: unsloth` needs `kernels: unsloth`, not "
            f"`{config.kernels}`: write `true`",
        )


def _range_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if not isinstance(config.num_devices, DeviceRange):
        return
    if config.deepspeed is not None:
        yield (
            "num_devices",
            "`num_devices` as a range does not work with `deepspeed`, whose checkpoints hold the optimizer in as many pieces as there "
            f"were devices: write `num_devices: {config.num_devices.max}`, or leave `deepspeed` out",
        )
    if config.preference_tuning_config and config.preference_tuning_config.loss == "kto":
        yield (
            "num_devices",
            "`num_devices` as a range does not work with `loss: kto`, which looks at all pairs that the devices hold at once: write "
            f"`num_devices: {config.num_devices.max}`, or another loss",
        )


def _deepspeed_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    offloads = "offload" in _deepspeed_name(config.deepspeed)
    is_zero_3 = isinstance(config.deepspeed, str) and config.deepspeed.startswith(
        "zero_3"
    )  # of a file, the plan knows
    if is_zero_3 and config.load_in_4bit:
        yield (
            "load_in_4bit",
            "`load_in_4bit` does not work with ZeRO-3, which cannot shard 4-bit weights: "
            "write `deepspeed: zero_2`, or `load_in_4bit: false`",
        )
    if is_zero_3 and config.kernels == "unsloth":
        yield (
            "kernels",
            "`kernels: unsloth` does not work with ZeRO-3: write `kernels: liger` or `torch`, or use zero_2",
        )
    if offloads and config.device == "cpu":
        yield "deepspeed", "offloading to CPU memory has no use with `device: cpu`: write `deepspeed: zero_3`"
    # Accelerate swaps the optimizer for DeepSpeed's CPU one, and takes plain Adam for any it does not know.
    in_cpu_memory = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit")
    if offloads and config.optim not in in_cpu_memory:
        yield (
            "optim",
            f"`optim: {config.optim}` cannot be offloaded to CPU memory: write `optim: adamw_torch`",
        )


@dataclass(frozen=True)
class UriField:
    """A URI that a configuration gives."""

    key: str
    """The YAML's key; dotted in a section. All items of a list have the list's key."""
    kind: UriKind
    uri: str


def uri_fields(config: FinetuneConfig) -> tuple[UriField, ...]:
    """Return every URI of the configuration, by the types of its fields."""
    return tuple(_uris_below(config, ""))


def _uris_below(section: Section, above: str) -> Iterator[UriField]:
    for name, field in type(section).model_fields.items():
        key, value = f"{above}{name}", getattr(section, name)
        kind = next(_uri_kinds(*field.metadata, field.annotation), None)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, DataSource):
                yield UriField(key, "data", item.path)
            elif isinstance(item, Section):
                yield from _uris_below(item, f"{key}.")
            elif kind and item is not None:
                yield UriField(key, kind, item)


def _uri_kinds(*annotations: Any) -> Iterator[UriKind]:
    for annotation in annotations:
        if isinstance(annotation, _UriMark):
            yield annotation.kind
        else:
            yield from _uri_kinds(*get_args(annotation))


def sections_of(annotation: Any) -> Iterator[type[Section]]:
    """The section classes in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_of(argument)
