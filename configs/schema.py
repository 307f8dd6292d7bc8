"""FinetuneConfig: every setting of a run, key by key.

The docstring under each field is its help text and its description in the JSON schema. A field's type checks
that field alone. `_conflicts`, at the end of this file, checks combinations of keys.
"""

import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from configs import sequence_parallel

DEFAULT_MIN_UPDATE_STEPS = 100
"""Minimum number of optimizer steps when the YAML does not set the length of the run."""

LENGTH_KEYS = ("num_epochs", "max_steps", "min_update_steps")
"""Each sets the length of a run, so a YAML sets at most one of them."""

DEEPSPEED_DIRECTORY = Path(__file__).parent / "deepspeed"

DeepspeedPreset = Literal["zero_1", "zero_2", "zero_3", "zero_3_offload_optim", "zero_3_offload_optim+param"]
"""Names of the files in configs/deepspeed/."""

DEEPSPEED_PRESETS: tuple[DeepspeedPreset, ...] = get_args(DeepspeedPreset)

# Keys that do not affect the final weights.
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
    "eval_max_new_tokens",
    "eval_samples",
    "export",
    "hub_model_id",
    "hub_private_repo",
    "push_to_hub",
    "loss_watchdog_patience",
    "loss_watchdog_threshold",
}


# Keys that divide the rows of a step among the devices.
DEVICE_KEYS = {
    "num_devices",
    "train_batch_size_per_device",
    "gradient_accumulation_steps",
    "train_batch_size",
}

# The hash holds these keys only if a YAML changes them, so runs that are older than the keys have the hash that they had.
_NOT_IN_HASH_BY_DEFAULT = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "chat_template_kwargs",
    "early_stopping_patience",
    "early_stopping_threshold",
    "ignore_columns",
    "eval_steps",
    "lr_scheduler_kwargs",
    "max_train_rows",
    "max_valid_rows",
    "new_special_tokens",
    "new_tokens",
    "save_steps",
    "sequence_parallel_size",
    "turns",
    "valid_split",
    "warmup_ratio",
)


class ConflictError(ValueError):
    """An error about values that are valid alone but not together.

    Attributes:
        conflicts: pairs of (key relative to the checked section, what is wrong and how to fix it).
    """

    def __init__(self, conflicts: list[tuple[str, str]]):
        super().__init__("; ".join(text for _, text in conflicts))
        self.conflicts = conflicts


def _uri(*schemes: str) -> AfterValidator:
    """Return a validator that accepts local paths and URIs with one of these schemes."""

    def check(value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if hub := re.match(r"https?://huggingface\.co/(datasets/)?([\w.-]+/[\w.-]+)", value):
            raise ValueError(
                f"a page of the Hub: write {f'hf://datasets/{hub[2]}' if hub[1] else hub[2]}, or download it"
            )
        if separator and scheme not in schemes:
            known = ", ".join(f"{known}://" for known in schemes)
            raise ValueError(f"{scheme}:// is not supported: use one of {known}, or a local path")
        if separator and not rest:
            raise ValueError(f"nothing follows {scheme}://: write the complete URI")
        start, colon, rest_of_path = value.partition(":")
        if not separator and colon and start in schemes:
            raise ValueError(f"two slashes follow the scheme: write {start}://{rest_of_path.lstrip('/')}")
        if scheme == "hf" and separator and not re.match(r"datasets/[^/?]+/[^/?]+", rest):
            raise ValueError("a Hub dataset must be written as hf://datasets/ORG/NAME/CONFIG?split=train")
        return value

    return AfterValidator(check)


def _local(value: str) -> str:
    scheme, separator, _ = value.partition("://")
    if separator:
        raise ValueError(
            f"{scheme}:// is not possible here, because this is a path on each machine: write a local path"
        )
    return value


def _bytes(value: str) -> int:
    """Convert text such as `50GiB` to bytes (53687091200)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?i?B)", value.strip(), re.IGNORECASE)
    if match is None:
        raise ConflictError(
            [("memory", "`memory` must be a number of bytes, or text such as 50GiB, 50GB or 512MiB")]
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


LocalPath = Annotated[Text, AfterValidator(_local)]


def _without_slash(uri: str) -> str:
    """Remove slashes at the end: one model has one spelling, so that a run has one name."""
    scheme, separator, path = uri.rpartition("://")
    return f"{scheme}{separator}{path.rstrip('/') or path}"


ModelUri = Annotated[Text, _uri(*_BUCKETS, "file"), AfterValidator(_without_slash), _UriMark("model")]
DataUri = Annotated[Text, _uri(*_BUCKETS, "hf", "file"), _UriMark("data")]
StorageUri = Annotated[Text, _uri(*_BUCKETS, "file"), _UriMark("storage")]
PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
DeviceCount = Annotated[int, Field(gt=0, le=100_000)]  # the checks of a range try every number
_MOST_SUGGESTED = 5
RowsPerStep = Annotated[int, Field(gt=0, le=100_000_000)]  # an automatic batch size tries every divisor


def _token(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty or only whitespace: write the text of the token, or remove it")
    return text


HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", max_length=96)]
NewToken = Annotated[str, AfterValidator(_token)]
Interval = PositiveInt | Annotated[float, Field(gt=0, lt=1)]
"""Number of steps, or a share of the steps of the run."""

ACCELERATOR = "accelerator_type:"
"""Prefix of Ray's resource names for GPU types."""

Resources = Annotated[
    dict[Text, Annotated[int | float, Field(ge=0)]],
    BeforeValidator(_memory_in_bytes),
    Field(json_schema_extra={"properties": {"memory": {"type": ["number", "string"]}}}),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Column = Literal[
    "messages",
    "conversations",
    "system",
    "history",
    "tools",
    "prompt",
    "completion",
    "reasoning",
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
    "tokens",
]
"""Formats of training rows; the docstring of `data_format` describes each."""


class Section(BaseModel):
    """Base class of all sections: frozen, rejects unknown keys and does not coerce values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


LARGEST_ALPHA = 3e38
"""Scaling factors above it are infinite in fp32."""


class LoraConfig(Section):
    """The fields of PEFT's LoraConfig that are plain data and leave the base weights unchanged."""

    r: PositiveInt = 8
    """Rank of the adapter."""

    lora_alpha: PositiveInt = 16
    """Scaling factor: the adapter's output is multiplied by lora_alpha / r."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. Any value other than 0 disables Unsloth's fused LoRA kernels."""

    target_modules: list[Text] | Text | None = "all-linear"
    """Modules that get an adapter: a list of names, a regular expression, `all-linear`, or null for PEFT's
    default for the architecture."""

    exclude_modules: list[Text] | Text | None = None
    """Modules to exclude although target_modules matches them: a list of names, or a regular expression."""

    target_parameters: list[Text] | None = None
    """Names of parameters (not modules) that get an adapter, such as the experts of an MoE model."""

    modules_to_save: list[Text] | None = None
    """Modules trained in full alongside the adapter and saved with it."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Bias parameters to train."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (rsLoRA)."""

    use_dora: bool = False
    """Decompose weights into magnitude and direction and train both (DoRA)."""

    lora_bias: bool = False
    """Add a bias to the adapter's B matrix."""

    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """Initialization of the adapter. true: B is zero, so that the initial model equals the base model. Methods that rewrite
    the base weights (PiSSA, OLoRA, LoftQ, ...) are excluded: their adapters do not load on the published base model."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the layers that get an adapter; null: all. Requires target_modules as a list."""

    layers_pattern: list[Text] | Text | None = None
    """Name of the model's list of layers, for models where PEFT does not find it."""

    rank_pattern: dict[Text, PositiveInt] = {}
    """Per-module rank: module name or regular expression -> r."""

    alpha_pattern: dict[Text, PositiveInt] = {}
    """Per-module scaling: module name or regular expression -> lora_alpha."""

    trainable_token_indices: list[NaturalInt] | dict[Text, list[NaturalInt]] | None = None
    """Token ids whose embeddings are trained, without training the complete embedding matrix."""

    ensure_weight_tying: bool = False
    """Keep tied embeddings tied when one of them is trained."""

    fan_in_fan_out: bool = False
    """Set to true for layers that store their weight as (in, out), such as GPT-2's Conv1D."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Only causal language models are supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = []
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            conflicts.append(
                ("layers_to_transform", "`layers_to_transform` requires `target_modules` as a list of names")
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            conflicts.append(
                ("layers_pattern", "`layers_pattern` requires `layers_to_transform`: add it, or remove it")
            )
        if self.target_modules in ("all", "all_linear", "linear", "all_linear_layers"):
            conflicts.append(
                (
                    "target_modules",
                    f"`target_modules: {self.target_modules}` matches no module: write `target_modules: all-linear`",
                )
            )
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            # As a regular expression, `q_proj,v_proj` would match no module.
            if isinstance(value, str) and "," in value and re.fullmatch(r"[\w.,\s-]+", value):
                names = ", ".join(name.strip() for name in value.split(","))
                conflicts.append(
                    (key, f"`{key}` is one text with commas: write the names as a list, `{key}: [{names}]`")
                )
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        regular_expressions = [
            *((key, getattr(self, key)) for key in ("target_modules", "exclude_modules")),
            *((key, each) for key in ("rank_pattern", "alpha_pattern") for each in getattr(self, key)),
            # PEFT reads the names in these lists as regular expressions, too.
            *(("layers_pattern", each) for each in layers),
            *(("modules_to_save", each) for each in self.modules_to_save or []),
        ]
        for key, value in regular_expressions:
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as error:
                conflicts.append(
                    (key, f"`{key}`: {value!r} is not a valid regular expression ({error}): correct it")
                )
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            conflicts.append(
                ("init_lora_weights", f"`init_lora_weights: orthogonal` requires even ranks, not {odd[0]}")
            )
        for key, alphas in (
            ("lora_alpha", [self.lora_alpha]),
            ("alpha_pattern", self.alpha_pattern.values()),
        ):
            if any(alpha > LARGEST_ALPHA for alpha in alphas):
                conflicts.append((key, f"`{key}` has a value that fp32 cannot hold: write a smaller one"))
        rows = self.trainable_token_indices or []
        for each in rows.values() if isinstance(rows, dict) else [rows]:
            if repeated := [row for row, count in Counter(each).items() if count > 1]:
                conflicts.append(
                    (
                        "trainable_token_indices",
                        f"`trainable_token_indices` lists {repeated[0]} twice: remove one",
                    )
                )
        if self.lora_bias and self.use_dora:
            conflicts.append(("lora_bias", "`lora_bias` and `use_dora` cannot be combined: remove one"))
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            conflicts.append(("lora_bias", "`lora_bias` requires `init_lora_weights: true`"))
        if conflicts:
            raise ConflictError(conflicts)
        return self


class DeepspeedFile(Section):
    """A custom DeepSpeed configuration file."""

    config_path: LocalPath
    """JSON file, relative to the current working directory. It needs no optimizer or scheduler block: those come
    from this YAML."""


class DeviceRange(Section):
    """Elastic number of Ray Train workers: training shrinks when nodes are lost and grows when nodes return."""

    min: DeviceCount
    """Minimum number of workers; with fewer the run waits."""

    max: DeviceCount
    """Maximum number of workers. train_batch_size_per_device and gradient_accumulation_steps refer to this number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ConflictError([("max", f"`max` is {self.max}, but `min` is {self.min}: swap them")])
        if self.min == self.max:  # two spellings of one run would get two hashes
            raise ConflictError(
                [
                    (
                        "max",
                        f"`max` and `min` are both {self.max}, which is not a range: write `num_devices: {self.max}`",
                    )
                ]
            )
        return self


def _one_spelling(frequency: object) -> object:
    """Return 2.0 as 2, so that two spellings of one run have one hash."""
    return int(frequency) if isinstance(frequency, float) and frequency.is_integer() else frequency


class CheckpointFrequency(Section):
    """Interval at which a checkpoint is written and the validation set is evaluated."""

    unit: Literal["epochs", "steps"] = "epochs"
    """Unit of frequency: epochs, or optimizer steps."""

    frequency: Annotated[PositiveInt | Annotated[float, Field(gt=0)], BeforeValidator(_one_spelling)] = 1
    """Number of units between two checkpoints; with epochs also a fraction, such as 0.25."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unit == "steps" and isinstance(self.frequency, float):
            raise ConflictError(
                [
                    (
                        "frequency",
                        f"`frequency` is {self.frequency}, but steps are counted in integers: write "
                        "`unit: epochs`, or an integer",
                    )
                ]
            )
        return self


class LrSchedulerKwargs(Section):
    """Further arguments of transformers' learning rate schedules."""

    num_cycles: Annotated[float, Field(gt=0)] | None = None
    """cosine, cosine_with_min_lr: number of waves, 0.5 falls once; cosine_with_restarts: number of falls from the peak."""

    power: Annotated[float, Field(gt=0)] | None = None
    """polynomial: exponent of the decay; null: 1."""

    lr_end: Annotated[float, Field(ge=0)] | None = None
    """polynomial: learning rate at the end; null: 1e-7."""

    min_lr: Annotated[float, Field(ge=0)] | None = None
    """cosine_with_min_lr: learning rate at the end."""

    min_lr_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """cosine_with_min_lr: learning rate at the end, as a share of learning_rate."""

    num_decay_steps: PositiveInt | None = None
    """warmup_stable_decay: optimizer steps of the decay at the end of the run; required for it."""

    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    """warmup_stable_decay: shape of the decay; null: cosine."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """warmup_stable_decay: learning rate at the end, as a share of learning_rate; null: 0."""

    timescale: PositiveInt | None = None
    """inverse_sqrt: steps over which the learning rate falls by a factor of the square root of 2; null: the warm-up."""


class PreferenceTuningConfig(Section):
    """Settings of `task: preference_tuning`."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference model; for orpo, weight of the odds-ratio loss."""

    loss: Literal["dpo", "ipo", "orpo", "kto"] = "dpo"
    """The preference loss. dpo, ipo and kto use the initial model as the reference model; orpo needs no reference model. kto
    also trains on unpaired rows: one answer with a `label` of true or false."""

    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the losses of good answers in kto, to balance unequal numbers of good and bad ones."""

    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the losses of bad answers in kto."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = [
            (key, f"`{key}` has no effect with `loss: {self.loss}`: write `loss: kto`, or remove it")
            for key in ("desirable_weight", "undesirable_weight")
            if self.loss != "kto" and getattr(self, key) != 1.0
        ]
        if conflicts:
            raise ConflictError(conflicts)
        return self

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares the model with a reference model."""
        return self.loss != "orpo"

    @property
    def takes_unpaired_rows(self) -> bool:
        """Return whether the loss also takes rows of one answer, and compares the rows that all devices process at once."""
        return self.loss == "kto"


class ClassifierConfig(Section):
    """Settings of `task: classification`."""

    label_tokens: Annotated[list[Text], Field(min_length=2)]
    """The labels, spelled as in the assistant's last message. A label may be several tokens; no token is added to the vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.label_tokens)) != len(self.label_tokens):
            raise ConflictError(
                [("label_tokens", "`label_tokens` lists a label twice: keep each label once")]
            )
        return self


class DataSource(Section):
    """One of several data sources."""

    path: DataUri
    """File, directory or prefix, glob, or Hub dataset."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of an epoch's rows, relative to the weights of the other sources; null for all sources: every row once."""


class WandbLogger(Section):
    """Weights & Biases. The API key comes from the environment variable WANDB_API_KEY."""

    provider: Literal["wandb"]
    """Logging service."""

    project: Text | None = None
    """Project; null: W&B's default."""

    entity: Text | None = None
    """User or team; null: the default entity of the API key."""

    name: Text | None = None
    """Display name of the run; null: the run's name."""

    group: Text | None = None
    """Group in which W&B lists the run."""

    tags: list[Text] = []
    """Tags of the run."""


class MlflowLogger(Section):
    """MLflow. Credentials come from the environment variables MLFLOW_* or DATABRICKS_*."""

    provider: Literal["mlflow"]
    """Logging service."""

    tracking_uri: Text | None = None
    """Tracking server; null: MLFLOW_TRACKING_URI."""

    experiment_name: Text | None = None
    """Experiment, created if it does not exist; null: MLflow's default."""

    tags: dict[Text, str] = {}
    """Tags of the run."""


class TensorboardLogger(Section):
    """TensorBoard event files, stored next to the run's metrics."""

    provider: Literal["tensorboard"]
    """Logging service."""


class ExportConfig(Section):
    """Export of the best checkpoint after the run has completed, the same as `main.py export`."""

    merge: bool = True
    """true: export a complete model, with an adapter merged into the 16-bit base weights; false: export the adapter alone,
    in a form that vLLM loads."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Data type of the exported model weights; an adapter retains its own."""

    to: StorageUri | None = None
    """Bucket prefix or directory to export to; null: exports/ in the run."""

    gguf: bool = False
    """Also write a GGUF file with llama.cpp's converter (`make setup-gguf`)."""

    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Type of the weights in the GGUF file; null: that of dtype."""

    verify: bool | None = None
    """Compare the export with the model as trained on a few rows before it is published, in fp32 on the CPU. null: if memory
    suffices. true: also in vLLM, if `make setup-vllm` has installed it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gguf and not self.merge:
            raise ConflictError(
                [("gguf", "`gguf` requires a complete model: write `merge: true`, or remove `gguf`")]
            )
        if self.gguf_type and not self.gguf:
            raise ConflictError(
                [("gguf_type", "`gguf_type` is the type of a GGUF file: write `gguf: true` too")]
            )
        return self

    @property
    def gguf_name(self) -> str | None:
        """Return the type of the weights in the GGUF file; None without one."""
        return (
            (self.gguf_type or {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[self.dtype])
            if self.gguf
            else None
        )


DataPaths = DataUri | Annotated[list[DataUri | DataSource], Field(min_length=1)]


def _sources(paths: DataPaths | None) -> tuple[DataSource, ...]:
    listed = paths if isinstance(paths, list) else [paths] if paths else []
    return tuple(item if isinstance(item, DataSource) else DataSource(path=item) for item in listed)


class FinetuneConfig(Section):
    """One fine-tuning run."""

    model_id: ModelUri
    """Model to train: a Hub id, a local directory, or an s3:// prefix."""

    initial_base_model_ckpt_path: ModelUri | None = None
    """Full-parameter weights to start from instead of those of model_id: s3:// prefix, local directory, a run's URI, or
    run:NAME under the same storage_path. A run means its best checkpoint. Loads weights only."""

    initial_adapter_model_ckpt_path: ModelUri | None = None
    """LoRA adapter to continue training: s3:// prefix, local directory, a run's URI, or run:NAME under the same
    storage_path. A run means its best checkpoint. Loads weights only. Without lora_config the adapter retains its rank and
    target modules."""

    resume: Literal["auto", "never"] = "auto"
    """auto: a run with committed checkpoints resumes from the latest one; never: a run with committed checkpoints is an error."""

    resume_from_checkpoint: ModelUri | None = None
    """Checkpoint of another run from which a new run restores the complete training state: weights, optimizer, scheduler,
    RNG state and data position."""

    task: Literal["instruction_tuning", "causal_lm", "preference_tuning", "classification"] = (
        "instruction_tuning"
    )
    """instruction_tuning: loss on assistant turns only; causal_lm: loss on every token; preference_tuning: chosen against
    rejected answers; classification: loss on the label only."""

    train_path: DataPaths
    """Training rows: JSONL, JSON or CSV, also compressed as .gz or .zst, or Parquet. One location (a file, a directory or
    prefix, a glob; s3://, local, or hf://datasets/ORG/NAME/CONFIG?split=train[50%:]), a list of locations, or a list of
    `{path: ..., weight: ...}`. With weights, an epoch has as many rows as all sources together, sampled by weight."""

    valid_path: DataPaths | Annotated[dict[Name, DataPaths], Field(min_length=1)] | None = None
    """Validation rows, as train_path but without weights; null: no evaluation, and the latest checkpoint counts as the best.
    Several sets by name, `{math: s3://..., chat: s3://...}`, each have metrics of their own (eval_math_loss); the first is the
    eval loss that decides which checkpoint is the best."""

    valid_split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Approximate share of the rows of train_path that are validation rows instead, without valid_path. Complete
    conversations, chosen by seed and content: equal rows are on the same side."""

    max_train_rows: PositiveInt | None = None
    """Number of training rows read from each source, from its start; null: all."""

    max_valid_rows: PositiveInt | None = None
    """Number of validation rows read from each source, from its start; null: all."""

    data_format: Literal["auto"] | DataFormat = "auto"
    """Format of the rows. messages: chats of role and content (`tools`, `tool_calls`, `weight: 0`); conversations:
    ShareGPT's from and value; prompt_completion; instruction: with input and output; text: raw text, for causal_lm;
    preference: chosen and rejected, with or without prompt; classification: text and label; tokens: pretokenised input_ids with
    labels or masks. auto: detected from the columns."""

    columns: dict[Column, Text] = {}
    """Column names in the files: `{prompt: question, completion: answer}`."""

    ignore_columns: list[Text] = []
    """Columns to ignore, such as a quality `score` that would otherwise be rejected. The plan counts them."""

    bad_rows: Literal["error", "skip"] = "error"
    """Handling of rows that cannot be trained on. error: list them and stop before training; skip: exclude them, count them
    and list them in the run's skipped_rows.jsonl."""

    chat_template: Text | None = None
    """Jinja chat template for conversations, inline or as a file path; null: the model's own."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, in training and evaluation, such as `{enable_thinking: false}`."""

    new_tokens: list[NewToken] = []
    """Tokens to add to the vocabulary, such as `["<tool>"]`. Their rows of the embedding and the LM head start as the mean of the
    rows that their text had before, and are trained, also with lora_config."""

    new_special_tokens: list[NewToken] = []
    """Like new_tokens, but answers are shown without these."""

    turns: Literal["auto", "last", "all"] = "auto"
    """Assistant messages in the loss. auto: all, each in the context in which the model will be asked for it, in several
    sequences where the template renders earlier turns differently; last: the last one; all: all in one sequence, or an error."""

    prompt_template: Text | None = None
    """Template for rows rendered without a chat template: text with {column} placeholders, the answer's last, such as
    `"### Instruction: {instruction} ### Response: {output}"`. The loss is on the answer and the EOS token."""

    context_length: PositiveInt | None = None
    """Maximum length of a training row in tokens; null: the longest row in the data, up to the model's maximum."""

    long_rows: Literal["truncate", "drop", "error"] = "truncate"
    """Handling of rows longer than context_length. Their number is reported first."""

    padding: Literal["longest", "max_length"] = "longest"
    """longest: group rows of similar length and pad each batch to its longest row; max_length: always pad to context_length
    (the worst case, for profiling)."""

    packing: bool = False
    """Pack several rows into one sequence of context_length tokens (null: of the longest row), without attention across rows.
    Batch sizes then count packed sequences."""

    num_devices: DeviceCount | DeviceRange = 1
    """Number of Ray Train workers, one device each. `{min: 1, max: 2}`: as many of them as the cluster has nodes for. Each step
    uses the same rows for every number of workers: with fewer than max, each worker accumulates more batches. Numbers that
    cannot share the batches equally are skipped."""

    sequence_parallel_size: DeviceCount = 1
    """Number of workers that share each sequence, for rows that are too long for one device. Each holds an equal part of its
    tokens, and a part of the heads during attention (DeepSpeed-Ulysses). It must divide num_devices and the model's heads. Batch
    sizes per device then count the rows of such a group of workers."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: one GPU per worker on a cluster (RAY_ADDRESS, --submit) and on a machine with GPUs, else CPU."""

    worker_resources: Resources = {}
    """Ray resources per worker, such as `accelerator_type:A10G: 0.001`; memory in bytes or as 50GiB. With `device: cpu`, a worker has as
    many threads as its `CPU`; without `CPU`, the workers of a node share all of its cores."""

    trainer_resources: Resources = {}
    """Accepted for compatibility with older files and ignored; Ray Train's controller takes no resources."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows. Set only one of num_epochs, max_steps and min_update_steps."""

    max_steps: PositiveInt | None = None
    """Number of optimizer steps, regardless of epochs."""

    min_update_steps: PositiveInt | None = None
    """Minimum number of optimizer steps, rounded up to full epochs; 100 if none of the three is set."""

    train_batch_size_per_device: PositiveInt | Literal["auto"] = 1
    """Rows per device and forward pass; auto: as many rows of train_batch_size as are estimated to fit into memory."""

    train_batch_size: RowsPerStep | None = None
    """Rows per optimizer step over all devices, for `train_batch_size_per_device: auto`. Gradient accumulation makes up the
    difference, so that training does not depend on a device's memory."""

    eval_batch_size_per_device: PositiveInt | None = None
    """Rows per device and forward pass in evaluation; null: same as train_batch_size_per_device."""

    gradient_accumulation_steps: PositiveInt = 1
    """Batches per device that are accumulated before an optimizer step."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate. About 1e-4 for LoRA, 1e-5 for full-parameter training."""

    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """Learning rate schedule after the warm-up, named as in transformers."""

    lr_scheduler_kwargs: LrSchedulerKwargs | None = None
    """Further arguments of the schedule, such as `{min_lr_rate: 0.1}` for cosine_with_min_lr; null: transformers' defaults."""

    num_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""

    warmup_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """num_warmup_steps as a share of the steps of the run, rounded up."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Maximum gradient norm for clipping; 0: no clipping."""

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
    """Optimizer, named as in transformers."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment in Adam and Lion."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of the second moment in Adam and Lion."""

    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Term that Adam adds to the denominator."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Random seed for data order, dropout and new weights."""

    kernels: Literal["auto", "unsloth", "liger", "torch"] = "auto"
    """Kernels that train the model; auto prints its choice and the reason."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """bf16: mixed precision, with the frozen base model of LoRA stored in bf16; fp32: everything in fp32."""

    load_in_4bit: bool = False
    """Store the frozen base weights in 4 bits (QLoRA)."""

    deterministic: bool = False
    """Use deterministic operations only. Without it, a resumed run on a GPU may differ by rounding, because the order of
    sums varies. Costs some speed. Runs on CPU are always deterministic."""

    flash_attention_2: bool = False
    """Use the flash-attn package; false: PyTorch's own attention. Unsloth's kernels use flash-attn if it is installed."""

    gradient_checkpointing: bool | Literal["unsloth"] = True
    """Recompute activations in the backward pass instead of storing them; unsloth: also offload them."""

    deepspeed: DeepspeedPreset | DeepspeedFile | None = None
    """DeepSpeed ZeRO: a preset's name, or `{config_path: FILE}`; null: plain data parallelism."""

    lora_config: LoraConfig | None = None
    """Train a LoRA adapter; null: full-parameter training, unless initial_adapter_model_ckpt_path provides an adapter."""

    preference_tuning_config: PreferenceTuningConfig | None = None
    """Settings of task preference_tuning; null: defaults."""

    classifier_config: ClassifierConfig | None = None
    """Settings of task classification; required for it."""

    checkpoint_and_evaluation_frequency: CheckpointFrequency = CheckpointFrequency()
    """Interval of checkpoints and evaluations, together."""

    eval_steps: Interval | None = None
    """Optimizer steps between two evaluations, if they have an interval of their own; a number below 1 is a share of the steps
    of the run, rounded up. null: checkpoint_and_evaluation_frequency."""

    save_steps: Interval | None = None
    """Optimizer steps between two checkpoints, as eval_steps. A checkpoint at a step without an evaluation has no eval loss, so
    it never counts as the best."""

    early_stopping_patience: PositiveInt | None = None
    """Stop training after this many evaluations in a row without a lower eval loss; null: train to the end."""

    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Decrease of the eval loss, in nats per loss token, that does not count as lower."""

    loss_watchdog_threshold: Annotated[float, Field(gt=0)] | None = None
    """Fail the run if the training loss is above this value for loss_watchdog_patience steps in a row; null: only if a loss is NaN
    or infinite."""

    loss_watchdog_patience: PositiveInt = 3
    """Steps in a row above loss_watchdog_threshold."""

    eval_first: bool = True
    """Evaluate before the first training step (if valid_path is set)."""

    eval_samples: Annotated[int, Field(gt=0, le=100)] | None = None
    """Number of validation prompts that the model answers at each evaluation, for the report: the same ones each time, chosen by
    seed, answered greedily. Training is unchanged. null: none."""

    eval_max_new_tokens: Annotated[int, Field(gt=0, le=4096)] = 128
    """Maximum length of these answers in tokens."""

    num_checkpoints_to_keep: PositiveInt = 1
    """Number of checkpoints to keep, best by evaluation loss. The latest checkpoint is always kept as well."""

    storage_path: StorageUri | None = None
    """Bucket prefix under which runs are stored; null: $ANYSCALE_ARTIFACT_STORAGE, else /mnt/cluster_storage if it
    exists, else the embedded bucket."""

    run_name: Name | None = None
    """Name of the run under storage_path; null: derived from the YAML's name and contents, so that the same command
    resumes the same run."""

    output_dir: LocalPath | None = None
    """Scratch directory on each node, not the place of results (storage_path); null: /mnt/local_storage if it exists, else the user's cache directory."""

    trust_remote_code: bool = False
    """Run Python code that is shipped with the model. Gated models need HF_TOKEN in the environment."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Number of restarts of the run after a worker or a node is lost."""

    logger: (
        Annotated[WandbLogger | MlflowLogger | TensorboardLogger, Field(discriminator="provider")] | None
    ) = None
    """Additional destination of metrics, besides the run's own metrics.jsonl."""

    export: ExportConfig | None = None
    """Export the best checkpoint after the run has completed: `{merge: true, dtype: bf16, to: s3://...}`; null: do not export."""

    push_to_hub: bool = False
    """Push the result to the Hugging Face Hub after the run has completed: the export, or without `export` the adapter alone (the
    model, in full-parameter training). The token comes from the environment variable HF_TOKEN."""

    hub_model_id: HubId | None = None
    """Model repository to push to, ORG/NAME; it is created if it does not exist. Required by push_to_hub."""

    hub_private_repo: bool | None = None
    """true makes a new repository private, false public; null: the default of the account."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        conflicts = list(_conflicts(self))
        if conflicts:
            raise ConflictError(conflicts)
        return self

    @property
    def final_export(self) -> ExportConfig | None:
        """Return the export of the completed run: `export`, or the one that push_to_hub needs."""
        if self.export is None and self.push_to_hub:
            return ExportConfig(merge=not self.trains_adapter)
        return self.export

    @property
    def preference(self) -> PreferenceTuningConfig:
        """Return preference_tuning_config; its defaults if it is not set."""
        return self.preference_tuning_config or PreferenceTuningConfig()

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Return new_tokens and new_special_tokens."""
        return (*self.new_tokens, *self.new_special_tokens)

    @property
    def batch_size(self) -> int:
        """Return train_batch_size_per_device. It must be a number, as in every plan."""
        assert self.train_batch_size_per_device != "auto"
        return self.train_batch_size_per_device

    def warmup_steps(self, steps: int) -> int:
        """Return the optimizer steps of the warm-up in a run of this many steps."""
        return self.num_warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * steps)

    def scheduler_arguments(self) -> dict[str, Any]:
        """Return the arguments of lr_scheduler_kwargs that are set."""
        given = self.lr_scheduler_kwargs
        return given.model_dump(exclude_none=True) if given else {}

    def evaluation_interval(self, steps_per_epoch: int, steps: int) -> Fraction:
        """Return the optimizer steps between two evaluations, which may be a fraction.

        Args:
            steps_per_epoch: optimizer steps per pass over the training rows.
            steps: optimizer steps of the run.
        """
        return self._interval(self.eval_steps, steps_per_epoch, steps)

    def checkpoint_interval(self, steps_per_epoch: int, steps: int) -> Fraction:
        """Return the optimizer steps between two checkpoints; arguments as of evaluation_interval."""
        return self._interval(self.save_steps, steps_per_epoch, steps)

    def _interval(self, own: int | float | None, steps_per_epoch: int, steps: int) -> Fraction:
        if own is not None:  # transformers rounds a share up, too
            return Fraction(own if isinstance(own, int) else math.ceil(own * steps))
        both = self.checkpoint_and_evaluation_frequency
        # By its digits: as a binary number 0.1 is a little more than a tenth, and the last evaluation of an epoch would be late.
        return Fraction(str(both.frequency)) * (steps_per_epoch if both.unit == "epochs" else 1)

    @property
    def most_devices(self) -> int:
        """Return num_devices, or the upper end of its range."""
        return self.num_devices.max if isinstance(self.num_devices, DeviceRange) else self.num_devices

    @property
    def fewest_devices(self) -> int:
        """Return num_devices, or the lower end of its range."""
        return self.num_devices.min if isinstance(self.num_devices, DeviceRange) else self.num_devices

    def replicas_on(self, devices: int) -> int:
        """Return how many batches this number of devices processes at once: the workers that share sequences have one together."""
        return devices // self.sequence_parallel_size

    @property
    def device_counts(self) -> tuple[int, ...]:
        """Return the allowed numbers of workers, ascending: those that share the batches of a step equally."""
        batches = self.replicas_on(self.most_devices) * self.gradient_accumulation_steps
        size = self.sequence_parallel_size
        return tuple(
            devices
            for devices in range(self.fewest_devices, self.most_devices + 1)
            if devices % size == 0 and batches % self.replicas_on(devices) == 0
        )

    def accumulation_on(self, devices: int) -> int:
        """Return the gradient accumulation steps per device that keep the rows of an optimizer step the same.

        Args:
            devices: one of device_counts.
        """
        batches = self.replicas_on(self.most_devices) * self.gradient_accumulation_steps
        return batches // self.replicas_on(devices)

    @property
    def rows_per_step(self) -> int:
        """Return the rows (or packs) of an optimizer step over all devices. The batch size must be a number."""
        return self.batch_size * self.replicas_on(self.most_devices) * self.gradient_accumulation_steps

    def possible_batch_sizes(self) -> Iterator[int]:
        """Yield the candidates for `train_batch_size_per_device: auto`, descending. All share a step's batches equally."""
        assert self.train_batch_size is not None
        share = self.train_batch_size // self.replicas_on(self.most_devices)
        fewest = self.replicas_on(self.fewest_devices)
        low = [rows for rows in range(1, math.isqrt(share) + 1) if share % rows == 0]
        for rows in sorted({*low, *(share // rows for rows in low)}, reverse=True):
            if (self.train_batch_size // rows) % fewest == 0:
                yield rows

    def with_batch_size(self, rows: int) -> Self:
        """Return the configuration with `train_batch_size_per_device: auto` resolved; rows per step stay the same.

        Args:
            rows: rows per device and forward pass, one of possible_batch_sizes.
        """
        assert self.train_batch_size is not None
        accumulated = self.train_batch_size // (self.replicas_on(self.most_devices) * rows)
        said = self.model_dump(exclude_unset=True) | {
            "train_batch_size_per_device": rows,
            "gradient_accumulation_steps": accumulated,
            "train_batch_size": None,
        }
        return self.model_validate(said)

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """Return train_path as a list of sources."""
        return _sources(self.train_path)

    @property
    def valid_sets(self) -> dict[str, tuple[DataSource, ...]]:
        """Return name -> sources of each validation set; the name is empty if valid_path gives none, or with valid_split."""
        if self.valid_split is not None:
            return {"": tuple(DataSource(path=source.path) for source in self.train_sources)}
        if isinstance(self.valid_path, dict):
            return {name: _sources(paths) for name, paths in self.valid_path.items()}
        return {"": _sources(self.valid_path)} if self.valid_path else {}

    @property
    def valid_sources(self) -> tuple[DataSource, ...]:
        """Return the sources of all validation sets."""
        return tuple(source for sources in self.valid_sets.values() for source in sources)

    @property
    def trains_adapter(self) -> bool:
        """Return true for LoRA, new or continued, and false for full-parameter training."""
        return self.lora_config is not None or self.initial_adapter_model_ckpt_path is not None

    def number_of_epochs(self, steps_per_epoch: int) -> float | None:
        """Return the epochs to train; None if max_steps sets the length.

        Args:
            steps_per_epoch: optimizer steps per pass over the training rows, at least 1.
        """
        if self.max_steps is not None:
            return None
        if self.num_epochs is not None:
            return self.num_epochs
        return float(math.ceil((self.min_update_steps or DEFAULT_MIN_UPDATE_STEPS) / steps_per_epoch))


def config_hash(config: FinetuneConfig, *, without: Collection[str] = ()) -> str:
    """Return 64 hex digits that are equal for configurations with the same training result.

    The hash excludes storage location, name, logging, retries and resources. It includes files by name only, not
    by the contents of the data or of a custom DeepSpeed file.

    Args:
        config: The configuration.
        without: More keys to exclude.
    """
    unchanged = {
        name
        for name in _NOT_IN_HASH_BY_DEFAULT
        if getattr(config, name) == FinetuneConfig.model_fields[name].default
    }
    said = config.model_dump(mode="json", exclude=NOT_IN_HASH | unchanged | set(without))
    for key in ("desirable_weight", "undesirable_weight"):  # these are newer, too
        if said["preference_tuning_config"] and said["preference_tuning_config"][key] == 1.0:
            del said["preference_tuning_config"][key]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def deepspeed_preset_path(preset: DeepspeedPreset) -> Path:
    """Return the path of a preset's JSON file."""
    return DEEPSPEED_DIRECTORY / f"{preset}.json"


def _conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    """Yield conflicts between keys: (key, what is wrong and how to fix it)."""
    yield from _start_conflicts(config)
    if conflicts := list(_sequence_conflicts(config)):
        yield from conflicts
        return  # the other checks divide devices into groups of this size
    yield from _length_conflicts(config)
    yield from _stop_conflicts(config)
    yield from _sample_conflicts(config)
    yield from _token_conflicts(config)
    yield from _scheduler_conflicts(config)
    yield from _batch_conflicts(config)
    yield from _task_conflicts(config)
    yield from _initialization_conflicts(config)
    yield from _data_conflicts(config)
    yield from _device_conflicts(config)
    yield from _range_conflicts(config)
    yield from _precision_conflicts(config)
    yield from _hub_conflicts(config)
    if config.export and not config.export.merge and not config.trains_adapter:
        yield (
            "export.merge",
            "`export.merge: false` exports an adapter, but this run does full-parameter training: remove `merge`",
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
                f"`{key}` and `resume_from_checkpoint` both set the initial weights: keep "
                f"`{key}` to start a new run from weights only, or `resume_from_checkpoint` to restore the "
                f"complete training state",
            )


_SCHEDULER_KWARGS = {
    "cosine": {"num_cycles"},
    "cosine_with_restarts": {"num_cycles"},
    "cosine_with_min_lr": {"num_cycles", "min_lr", "min_lr_rate"},
    "polynomial": {"power", "lr_end"},
    "inverse_sqrt": {"timescale"},
    "warmup_stable_decay": {"num_decay_steps", "decay_type", "min_lr_ratio"},
}


def _scheduler_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    given, schedule = set(config.scheduler_arguments()), config.lr_scheduler_type
    for name in sorted(given - _SCHEDULER_KWARGS.get(schedule, set())):
        takers = [other for other, names in _SCHEDULER_KWARGS.items() if name in names]
        yield (
            f"lr_scheduler_kwargs.{name}",
            f"`lr_scheduler_kwargs.{name}` has no effect with `lr_scheduler_type: {schedule}`: remove it, or use {' or '.join(takers)}",
        )
    if schedule == "cosine_with_min_lr" and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield (
            "lr_scheduler_type",
            "`lr_scheduler_type: cosine_with_min_lr` needs one end: add `lr_scheduler_kwargs: {min_lr_rate: 0.1}`, or `min_lr`",
        )
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield (
            "lr_scheduler_type",
            "`lr_scheduler_type: warmup_stable_decay` needs the steps of its decay: add `lr_scheduler_kwargs: {num_decay_steps: 100}`",
        )


def _length_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    given = [key for key in LENGTH_KEYS if getattr(config, key) is not None]
    if len(given) > 1:
        yield (
            given[-1],
            f"{' and '.join(f'`{key}`' for key in given)} each set the length of the run: keep one of them",
        )
    if config.warmup_ratio is not None and config.num_warmup_steps > 0:
        yield "warmup_ratio", "`num_warmup_steps` and `warmup_ratio` both set the warm-up: keep one of them"
    if config.lr_scheduler_type == "constant" and config.warmup_ratio is not None:
        yield (
            "warmup_ratio",
            "`lr_scheduler_type: constant` has no warm-up: use `constant_with_warmup`, or remove `warmup_ratio`",
        )
    if config.lr_scheduler_type == "constant" and config.num_warmup_steps > 0:
        yield (
            "num_warmup_steps",
            "`lr_scheduler_type: constant` has no warm-up: use `constant_with_warmup`, or "
            "`num_warmup_steps: 0`",
        )


def _stop_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.early_stopping_patience is not None and not config.valid_sources:
        yield (
            "early_stopping_patience",
            "`early_stopping_patience` compares eval losses, but there are no validation rows: add `valid_path` or `valid_split`",
        )
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        yield (
            "early_stopping_threshold",
            "`early_stopping_threshold` has no effect without `early_stopping_patience`: add it, or remove the threshold",
        )
    if config.loss_watchdog_patience != 3 and config.loss_watchdog_threshold is None:
        yield (
            "loss_watchdog_patience",
            "`loss_watchdog_patience` has no effect without `loss_watchdog_threshold`: add it, or remove the patience",
        )


def _sample_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.eval_samples is None:
        if config.eval_max_new_tokens != FinetuneConfig.model_fields["eval_max_new_tokens"].default:
            yield (
                "eval_max_new_tokens",
                "`eval_max_new_tokens` has no effect without `eval_samples`: add it, or remove `eval_max_new_tokens`",
            )
        return
    if not config.valid_sources:
        yield (
            "eval_samples",
            "`eval_samples` answers prompts of validation rows, but there are none: add `valid_path` or `valid_split`",
        )
    if config.task == "causal_lm":
        yield (
            "eval_samples",
            "`eval_samples` needs prompts, but with `task: causal_lm` every token of a row is trained: remove it, or write "
            "`task: instruction_tuning` for rows with a prompt",
        )


def _hub_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.push_to_hub and config.hub_model_id is None:
        yield (
            "push_to_hub",
            "`push_to_hub` needs a repository: add `hub_model_id: ORG/NAME`, or remove `push_to_hub`",
        )
    for key in ("hub_model_id", "hub_private_repo"):
        if getattr(config, key) is not None and not config.push_to_hub:
            yield key, f"`{key}` has no effect without `push_to_hub: true`: add it, or remove `{key}`"


def _token_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if not config.added_tokens:
        return
    key = "new_tokens" if config.new_tokens else "new_special_tokens"
    if twice := [token for token in config.added_tokens if config.added_tokens.count(token) > 1]:
        yield (
            key,
            f"`{key}` lists {twice[0]!r} twice (with new_tokens and new_special_tokens together): keep it once",
        )
    if config.initial_adapter_model_ckpt_path is not None:
        yield (
            key,
            f"`{key}` does not work with `initial_adapter_model_ckpt_path`, since an adapter keeps its rows: remove `{key}` if the adapter "
            "has these tokens, or merge it with `main.py export` and write the merged model as `model_id`",
        )
    if config.lora_config and isinstance(config.lora_config.trainable_token_indices, dict):
        yield (
            "lora_config.trainable_token_indices",
            f"`lora_config.trainable_token_indices` as a mapping does not work with `{key}`: write a list of token ids",
        )


def _sequence_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    key, size = sequence_parallel.KEY, config.sequence_parallel_size
    if size == 1:
        return
    for devices in dict.fromkeys((config.fewest_devices, config.most_devices)):
        if devices % size:
            usable = _nearest(size, [number for number in range(1, devices + 1) if devices % number == 0])
            yield (
                key,
                f"`{key}` is {size}, which does not divide `num_devices` ({devices}): use {' or '.join(usable)}, or a multiple of "
                f"{size} as `num_devices`",
            )
    if config.task == "preference_tuning":
        yield key, sequence_parallel.error_with("`task: preference_tuning`")
    if config.task == "classification":
        yield key, sequence_parallel.error_with("`task: classification`")
    if config.eval_samples is not None:
        yield key, sequence_parallel.error_with("`eval_samples`")
    if config.flash_attention_2:
        yield key, sequence_parallel.error_with("`flash_attention_2`")


def _nearest(wanted: int, usable: list[int]) -> list[str]:
    """Return the usable numbers that are nearest to a wanted one, ascending, for a message."""
    return list(map(str, sorted(sorted(usable, key=lambda number: abs(number - wanted))[:_MOST_SUGGESTED])))


def _batch_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    rows, size = config.train_batch_size, config.sequence_parallel_size
    if config.train_batch_size_per_device != "auto":
        if config.fewest_devices not in config.device_counts:
            batches = config.replicas_on(config.most_devices) * config.gradient_accumulation_steps
            usable = _nearest(
                config.fewest_devices,
                [
                    count
                    for count in range(size, config.most_devices, size)
                    if batches % config.replicas_on(count) == 0
                ],
            )
            yield (
                "num_devices.min",
                f"`num_devices.min` is {config.fewest_devices}, but that many devices cannot share the {batches} batches of a step "
                f"equally (max x gradient_accumulation_steps): use {' or '.join(usable)}, or change `gradient_accumulation_steps`",
            )
        if rows is not None:
            yield (
                "train_batch_size",
                "`train_batch_size` requires `train_batch_size_per_device: auto`: add that, or remove `train_batch_size`",
            )
        return
    if rows is None:
        yield (
            "train_batch_size_per_device",
            "`train_batch_size_per_device: auto` requires `train_batch_size`, the rows per optimizer step: without it, training "
            "would depend on a device's memory",
        )
    for devices in dict.fromkeys((config.fewest_devices, config.most_devices)):
        replicas = config.replicas_on(devices)
        if rows is not None and rows % replicas:
            sharers = f"{replicas} devices" if size == 1 else f"{replicas} groups of {size} devices"
            yield (
                "train_batch_size",
                f"`train_batch_size` is {rows}, which {sharers} cannot share equally: use a multiple of {replicas}",
            )
    if config.gradient_accumulation_steps > 1:
        yield (
            "gradient_accumulation_steps",
            "`gradient_accumulation_steps` is computed from `train_batch_size` with `train_batch_size_per_device: auto`: remove it",
        )


def _initialization_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    """Yield initializations of a new adapter that fail, or do not start at the reference of a preference loss, the base model."""
    if config.lora_config is None or config.initial_adapter_model_ckpt_path:
        return
    start, key = config.lora_config.init_lora_weights, "lora_config.init_lora_weights"
    if start == "orthogonal" and config.load_in_4bit:
        yield (
            key,
            f"`{key}: orthogonal` does not work with `load_in_4bit` in PEFT: write `true` or `gaussian`",
        )
    settings = config.preference
    if config.task != "preference_tuning" or not settings.needs_reference:
        return
    if start is False:
        yield (
            key,
            f"`{key}: false` starts from a randomly changed model, but the reference of `loss: {settings.loss}` is the unchanged base: "
            "write `true`, or `loss: orpo`",
        )
    if start == "orthogonal" and config.dtype == "bf16":
        yield (
            key,
            f"`{key}: orthogonal` starts from the base model only up to the rounding of `dtype: bf16`, but the reference of "
            f"`loss: {settings.loss}` is the base itself: write `true`, or `dtype: fp32`",
        )


def _task_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.preference_tuning_config is not None and config.task != "preference_tuning":
        yield (
            "preference_tuning_config",
            f"`preference_tuning_config` has no effect with `task: {config.task}`: write `task: "
            f"preference_tuning`, "
            "or remove the section",
        )
    if config.classifier_config is not None and config.task != "classification":
        yield (
            "classifier_config",
            f"`classifier_config` has no effect with `task: {config.task}`: write `task: classification`, "
            "or remove the section",
        )
    if config.task == "classification" and config.classifier_config is None:
        yield (
            "task",
            "`task: classification` requires labels: add `classifier_config: {label_tokens: [...]}`",
        )
    if config.packing and config.padding == "max_length":
        yield "packing", "`packing` leaves no padding: write `padding: longest`, or `packing: false`"
    if config.packing and config.task in ("preference_tuning", "classification"):
        yield (
            "packing",
            f"`packing` does not work with `task: {config.task}`, which scores each answer separately: write `packing: false`",
        )


def _data_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    for ours, theirs in config.columns.items():
        if theirs in config.ignore_columns:
            yield (
                "ignore_columns",
                f"`ignore_columns` lists `{theirs}`, which `columns` maps to `{ours}`: remove one",
            )
    weighted = [source.weight is not None for source in config.train_sources]
    if any(weighted) and not all(weighted):
        yield (
            "train_path",
            "`train_path` has a weight for some sources only: add one to each source, or remove all",
        )
    if config.valid_path is not None and config.valid_split is not None:
        yield (
            "valid_split",
            "`valid_path` and `valid_split` both choose the validation rows: keep one of them",
        )
    if any(source.weight is not None for source in config.valid_sources):
        yield (
            "valid_path",
            "`valid_path` has weights, but each validation row is evaluated once: remove the weights",
        )
    if config.chat_template and re.fullmatch(r"[\w-]+", config.chat_template):
        yield (
            "chat_template",
            f"`chat_template: {config.chat_template}` is neither a file nor Jinja text: remove the key to use the model's own template, or "
            "write the path of a .jinja file",
        )
    if config.chat_template and re.match(r"\w+://\S+$", config.chat_template):
        yield (
            "chat_template",
            "`chat_template` is read from a file on this machine: download it and write its path, or the template itself",
        )
    if config.prompt_template is not None:
        if config.chat_template is not None:
            yield "prompt_template", "`prompt_template` and `chat_template` both format rows: remove one"
        if fault := _prompt_template_fault(config.prompt_template):
            yield "prompt_template", fault
        if config.task in ("preference_tuning", "classification"):
            yield (
                "prompt_template",
                f"`prompt_template` does not work with `task: {config.task}`: remove it",
            )
    if config.data_format == "preference" and config.task != "preference_tuning":
        yield (
            "data_format",
            "`data_format: preference` requires `task: preference_tuning`: set that task as well",
        )
    has_pairs = config.data_format in ("auto", "preference")
    if config.preference.takes_unpaired_rows:
        has_pairs = config.data_format not in ("text", "classification", "tokens")
    if config.task == "preference_tuning" and not has_pairs:
        yield (
            "data_format",
            f"`data_format: {config.data_format}` has no pairs for `task: preference_tuning`: use `preference`, or "
            "`preference_tuning_config: {loss: kto}` for chats with a `label`",
        )
    if config.data_format == "tokens" and config.prompt_template is not None:
        yield "prompt_template", "`prompt_template` does not work with `data_format: tokens`: remove it"
    if config.data_format == "tokens" and config.task == "classification":
        yield (
            "data_format",
            "`data_format: tokens` has no labels for `task: classification`: use `classification`, or another task",
        )
    if config.data_format == "text" and config.task != "causal_lm":
        yield "data_format", "`data_format: text` has no answers to train on: write `task: causal_lm`"
    if config.data_format == "classification" and config.task != "classification":
        yield (
            "data_format",
            "`data_format: classification` requires `task: classification`: set that task as well",
        )


def _prompt_template_fault(template: str) -> str | None:
    """Return why the template cannot render rows; None if it can."""
    braces = "write {{ and }} for literal braces, and {column} for a placeholder"
    try:
        places = [parts[1:] for parts in string.Formatter().parse(template) if parts[1] is not None]
    except ValueError as error:
        return f"`prompt_template` cannot be parsed ({error}): {braces}"
    names = [str(name) for name, _, _ in places]
    for name, form, conversion in places:
        if form or conversion or not re.fullmatch(r"\w*[^\W\d]\w*", str(name)):
            return f"`prompt_template` has a placeholder that is not a column name ({{{name}…}}): {braces}"
    if len(names) < 2 or not template.rstrip().endswith(f"{{{names[-1]}}}"):
        return (
            "`prompt_template` needs at least two {column} placeholders and must end with the answer's: write something "
            'like "### Instruction: {instruction} ### Response: {output}"'
        )
    if names[-1] in names[:-1]:
        return f"`prompt_template` contains the answer's placeholder `{names[-1]}` twice: keep the one at the end"
    return None


def _device_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    gpus = config.worker_resources.get("GPU")
    key = "worker_resources.GPU"
    if gpus is not None and gpus > 1:
        yield (
            key,
            f"`{key}` is {gpus}, but each worker has one device: write `GPU: 1` and increase `num_devices`",
        )
    if gpus == 0 and config.device == "cuda":
        yield key, f"`{key}` is 0 with `device: cuda`: remove `GPU`, or write `device: cpu`"
    if gpus and config.device == "cpu":
        yield key, f"`{key}` is {gpus} with `device: cpu`: remove `GPU`, or write `device: cuda`"
    for name in config.worker_resources:
        if name.lower().removeprefix("num_").removesuffix("s") in ("gpu", "cpu") and name not in (
            "GPU",
            "CPU",
        ):
            meant = "GPU" if "gpu" in name.lower() else "CPU"
            yield (
                f"worker_resources.{name}",
                f"`worker_resources.{name}` is not a resource of Ray: did you mean `{meant}`?",
            )
    named = [name for name in config.worker_resources if name.startswith(ACCELERATOR)]
    if len(named) > 1:
        yield (
            "worker_resources",
            f"`worker_resources` requests {' and '.join(named)}, but a node has only one of them: keep one, on the command line as "
            "`worker_resources='{accelerator_type:NAME: 0.001}'`",
        )
    for name in named:
        if name == ACCELERATOR or config.worker_resources[name] > 1:
            yield (
                f"worker_resources.{name}",
                "an accelerator type needs a name and at most 1, which is all that Ray assigns to a node: write "
                "`accelerator_type:A10G: 0.001`",
            )


def _precision_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if config.load_in_4bit and not config.trains_adapter:
        yield (
            "load_in_4bit",
            "`load_in_4bit` does not support full-parameter training: add `lora_config` "
            "(or `initial_adapter_model_ckpt_path`), or write `load_in_4bit: false`",
        )
    if config.dtype == "fp32" and config.flash_attention_2:
        yield (
            "flash_attention_2",
            "`flash_attention_2` supports bf16 only: write `dtype: bf16`, or remove it",
        )
    if config.gradient_checkpointing == "unsloth" and config.kernels not in ("unsloth", "auto"):
        yield (
            "gradient_checkpointing",
            f"`gradient_checkpointing: unsloth` requires `kernels: unsloth`, not "
            f"`{config.kernels}`: write `true`",
        )


def _range_conflicts(config: FinetuneConfig) -> Iterator[tuple[str, str]]:
    if not isinstance(config.num_devices, DeviceRange):
        return
    if config.preference.takes_unpaired_rows:
        yield (
            "num_devices",
            "`num_devices` as a range does not work with `loss: kto`, which depends on the pairs that all devices process at once: "
            f"write `num_devices: {config.num_devices.max}`, or use another loss",
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
        for item in _items(value):
            if isinstance(item, DataSource):
                yield UriField(key, "data", item.path)
            elif isinstance(item, Section):
                yield from _uris_below(item, f"{key}.")
            elif kind and item is not None:
                yield UriField(key, kind, item)


def uri_keys(*kinds: UriKind) -> tuple[str, ...]:
    """Return the top-level keys whose values hold URIs of these kinds, by the types of their fields."""
    return tuple(
        key for key in FinetuneConfig.model_fields if set(kinds) & set(_kinds_of(FinetuneConfig, key))
    )


def _kinds_of(section: type[Section], key: str) -> Iterator[UriKind]:
    field = section.model_fields[key]
    yield from _uri_kinds(*field.metadata, field.annotation)
    for below in sections_of(field.annotation):
        for name in below.model_fields:
            yield from _kinds_of(below, name)


def _items(value: Any) -> Iterator[Any]:
    """Yield the items of a list, of the values of a mapping, or the value itself."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from _items(entry)
    elif isinstance(value, list):
        yield from value
    else:
        yield value


def _uri_kinds(*annotations: Any) -> Iterator[UriKind]:
    for annotation in annotations:
        if isinstance(annotation, _UriMark):
            yield annotation.kind
        else:
            yield from _uri_kinds(*get_args(annotation))


def sections_of(annotation: Any) -> Iterator[type[Section]]:
    """Yield the section classes in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_of(argument)
