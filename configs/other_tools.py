"""The keys of other fine-tuning tools and their counterparts in this project's YAML.

One table serves two readers: errors about an unknown key, and `main.py convert`. Read from transformers 5.17 (TrainingArguments),
TRL 1.15, Axolotl 0.19, LLaMA-Factory 0.9.5 and torchtune 0.6.1, with names of earlier versions that files still have.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from configs.schema import DEEPSPEED_PRESETS, FinetuneConfig
from configs.yaml_source import has_variable, plain_scalar

Tool = Literal["huggingface", "axolotl", "llamafactory", "torchtune"]

TOOL_NAMES: dict[Tool, str] = {
    "huggingface": "Hugging Face (TrainingArguments, TRL)",
    "axolotl": "Axolotl",
    "llamafactory": "LLaMA-Factory",
    "torchtune": "torchtune",
}

_LETTERS: dict[str, Tool] = {"h": "huggingface", "a": "axolotl", "l": "llamafactory", "t": "torchtune"}


class NoCounterpartError(ValueError):
    """An error about a value that has no counterpart; the message says what to use instead."""


class NotNumberError(NoCounterpartError):
    """An error about a value that is no number, where a number has a counterpart."""


class Ours(dict[str, Any]):
    """Several settings that replace one: our dotted keys and their values."""


def _unchanged(value: Any) -> Any:
    return value


def number(value: Any) -> int | float:
    """Return a number, which these tools also read from text such as "2e-4"; raise NotNumberError for other values."""
    found = plain_scalar(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise NotNumberError("write a number")
    return found


def _fraction(value: Any) -> float:
    return float(number(value))


def _count(value: Any) -> int | float | None:
    """Return a number; None for zero, -1 and null, which turn a limit off."""
    count = number(value) if value is not None else 0
    return count if count > 0 else None


@dataclass(frozen=True)
class Counterpart:
    """The replacement of one key of another tool."""

    tools: str
    """First letters of the tools that have the key with this meaning: h, a, l, t."""

    theirs: str
    """Their key, dotted in a section."""

    ours: str | None
    """Our key, dotted in a section; None: there is none."""

    value: Callable[[Any], Any] = _unchanged
    """Returns the value of our key, or Ours; None: nothing to write. Raises NoCounterpartError."""

    note: str = ""
    """The difference, or the reason why there is no counterpart."""

    differs: bool = False
    """True if training differs without a counterpart."""

    same: tuple[Any, ...] = ()
    """Values that mean what this project does anyway; empty: those that turn the setting off."""

    def is_same(self, value: Any) -> bool:
        """Return whether a value that gives no setting of ours means what this project does anyway."""
        return value in (self.same or (_OFF if self.differs or self.ours else ()))

    def settings(self, value: Any) -> Ours:
        """Return our settings for a value; empty if there is nothing to write.

        Raises:
            NoCounterpartError: the value has no counterpart.
        """
        if self.ours is None:
            return Ours()
        if isinstance(value, str):
            value = _SWITCHES.get(value.lower(), value)
        if has_variable(value):
            if self.value not in _NUMERIC and self.value is not _unchanged:
                raise NoCounterpartError("write its value: that of a variable is not known here")
            return Ours({self.ours: value})
        converted = self.value(value)
        if converted is None:
            return Ours()
        return converted if isinstance(converted, Ours) else Ours({self.ours: converted})


_OFF = (False, 0, "", "none", [], {})
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1 reads them so; here they are text

NO_FP16 = "fp16 is not supported: write `dtype: bf16` (NVIDIA GPUs since 2020) or `dtype: fp32`"
_CHOICES: dict[str, tuple[str, ...]] = {
    key: get_args(FinetuneConfig.model_fields[key].annotation) for key in ("optim", "lr_scheduler_type")
}


def _if(setting: Any, otherwise: Any = None) -> Callable[[Any], Any]:
    """Return a conversion for a switch: `setting` if it is on, `otherwise` if it is off."""
    return lambda value: setting if value else otherwise


def _bf16(value: Any) -> str:
    """Return the dtype: without 16 bits these tools train in fp32, and ours would be bf16."""
    return "bf16" if value in (True, "auto", "true") else "fp32"


def _fp16(value: Any) -> None:
    if value and value != "auto":
        raise NoCounterpartError(NO_FP16)


def _dtype(value: Any) -> str | None:
    match str(value).removeprefix("torch."):
        case "bfloat16" | "bf16" | "auto":
            return "bf16"
        case "float32" | "fp32":
            return "fp32"
        case "float16" | "fp16":
            raise NoCounterpartError(NO_FP16)
    raise NoCounterpartError("write `dtype: bf16` or `dtype: fp32`")


def _optimizer(value: Any) -> str:
    same = {
        "adamw": "adamw_torch_fused",
        "adamw_hf": "adamw_torch",
        "paged_adamw": "paged_adamw_32bit",
        "lion": "lion_32bit",
    }
    same |= {"torch.optim.AdamW": "adamw_torch", "torch.optim.SGD": "sgd"}
    same |= {
        "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
        "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    }
    if isinstance(value, dict | list):
        raise NoCounterpartError("write the name alone, such as `optim: adamw_torch_fused`")
    name = same.get(str(value)) or same.get(str(value).lower(), str(value))
    if name not in _CHOICES["optim"]:
        raise NoCounterpartError(
            f"there is no optimizer {value!r}: write `optim: adamw_torch_fused`, or another of keys.md"
        )
    return name


def _scheduler(value: Any) -> str:
    if value == "reduce_lr_on_plateau":
        raise NoCounterpartError("schedules that depend on eval losses are not supported: use `cosine`")
    if isinstance(value, dict | list):
        raise NoCounterpartError("write the name alone, such as `lr_scheduler_type: cosine`")
    name = str(value).rpartition(".")[2].removeprefix("get_").partition("_schedule")[0]
    if name not in _CHOICES["lr_scheduler_type"]:
        raise NoCounterpartError(
            f"there is no schedule {value!r}: use {', '.join(_CHOICES['lr_scheduler_type'][:4])} or another of keys.md"
        )
    return name


def deepspeed_setting(value: Any) -> Any:
    """Return the value of `deepspeed` for another tool's: a stage, or the path of a file that a preset replaces.

    Raises:
        NoCounterpartError: the value is an inline configuration.
    """
    if isinstance(value, bool):
        if value:
            raise NoCounterpartError("write its stage, such as `deepspeed: zero_2` or `deepspeed: zero_3`")
        return None
    if isinstance(value, dict):
        raise NoCounterpartError(
            "an inline DeepSpeed configuration goes into a JSON file: write `deepspeed: {config_path: FILE}`"
        )
    if value in ("none", "None", "off"):
        return None
    if value in (1, 2, 3) or str(value) in ("1", "2", "3"):
        return f"zero_{value}"
    if isinstance(value, int):
        return None
    name = PurePosixPath(str(value)).stem.lower().replace("-", "_")
    if name in DEEPSPEED_PRESETS:
        return name
    squeezed = name.replace("_", "")
    stage = next(
        (
            digit
            for digit in "123"
            if f"zero{digit}" in squeezed or f"z{digit}" in squeezed or f"stage{digit}" in squeezed
        ),
        None,
    )
    if stage == "3" and "offload" in squeezed:
        return "zero_3_offload_optim" if "optim" in squeezed else "zero_3_offload_optim+param"
    if stage and "offload" not in squeezed:
        return f"zero_{stage}"
    if "z0" in squeezed:
        return None
    return {"config_path": value}


def _max_steps(value: Any) -> Any:
    steps = number(value)
    return steps if steps > 0 else None


def _share(value: Any) -> Any:
    share = number(value) if value else 0
    if share >= 1:
        raise NoCounterpartError(
            "a number of rows is not supported: write `valid_split` as a share of the rows, such as 0.05"
        )
    return share or None


def _warmup(value: Any) -> Any:
    steps = number(value)
    if isinstance(steps, float) and 0 < steps < 1:
        return Ours({"warmup_ratio": steps})
    return int(steps)


def _tracker(value: Any) -> Any:
    names = [name for name in (value if isinstance(value, list) else [value]) if name not in (None, "none")]
    known = [name for name in names if name in ("wandb", "mlflow", "tensorboard")]
    if names and not known:
        raise NoCounterpartError(
            f"there is no tracker {names[0]!r}: use `logger: {{provider: wandb}}`, mlflow or tensorboard"
        )
    return known[0] if known else None


def _names(value: Any) -> Any:
    """Return names separated by commas as a list; `all` as all-linear."""
    if value in ("all", "all-linear", ["all-linear"]):
        return "all-linear"
    return (
        [name.strip() for name in value.split(",")]
        if isinstance(value, str) and "," in value
        else [value]
        if isinstance(value, str)
        else value
    )


def _adapter(value: Any) -> Any:
    if value == "qlora":
        return Ours({"lora_config": {}, "load_in_4bit": True})
    if value not in ("lora", "full"):
        raise NoCounterpartError(
            f"{value!r} is not supported: use `lora_config`, or train all weights without it"
        )
    return {} if value == "lora" else None


def _loss(value: Any) -> Any:
    first = value[0] if isinstance(value, list) and value else value
    loss = {
        "sigmoid": "dpo",
        "dpo": "dpo",
        "ipo": "ipo",
        "orpo": "orpo",
        "kto": "kto",
        "kto_pair": "kto",
    }.get(str(first))
    if loss is None:
        raise NoCounterpartError(f"there is no preference loss {first}: use dpo, ipo, orpo or kto")
    return loss


def _rl(value: Any) -> Ours:
    if value not in ("dpo", "ipo", "orpo", "kto"):
        raise NoCounterpartError(
            f"{value!r} is not supported: `task: preference_tuning` has dpo, ipo, orpo and kto"
        )
    return Ours({"task": "preference_tuning", "preference_tuning_config.loss": value})


def _stage(value: Any) -> Any:
    if value in ("dpo", "kto"):
        return _rl(value)
    task = {"sft": "instruction_tuning", "pt": "causal_lm"}.get(str(value))
    if task is None:
        raise NoCounterpartError(f"stage {value!r} is not supported: there are sft, pt, dpo and kto")
    return task


def _quantization_bit(value: Any) -> Any:
    if value == 8:
        raise NoCounterpartError(_NO_8BIT)
    return True if value == 4 else None


def _attention(value: Any) -> Any:
    return True if value in ("flash_attention_2", "fa2") else None


def _checkpointing(value: Any) -> Any:
    return value if value == "unsloth" else bool(value)


def _fsdp(value: Any) -> Any:
    """Return the stage that shards as FSDP does, from `fsdp`, `fsdp_config` or both of them in a list."""
    text = str(value).lower()
    if not value or "no_shard" in text:
        return None
    if re.search(r"(^|\W)offload\b|offload_params'?: true", text):
        return "zero_3_offload_optim+param"
    keeps_weights = "shard_grad_op" in text or re.search(r"reshard_after_forward'?: false", text)
    return "zero_2" if keeps_weights else "zero_3"


def _8bit(value: Any) -> None:
    if value:
        raise NoCounterpartError(_NO_8BIT)


def _eval_strategy(value: Any) -> Any:
    return Ours({"checkpoint_and_evaluation_frequency.unit": "epochs"}) if value == "epoch" else None


def _per_epoch(value: Any) -> Any:
    times = number(value) if value else 0
    return {"unit": "epochs", "frequency": round(1 / times, 4)} if times else None


def _paths(value: Any) -> Any:
    """Return the paths of Axolotl's list of data sets."""
    items = value if isinstance(value, list) else [value]
    paths = [item.get("path") if isinstance(item, dict) else item for item in items]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise NoCounterpartError("name the rows in `train_path` and `valid_path`")
    return paths if len(paths) > 1 else paths[0]


def _plugins(value: Any) -> Any:
    if "liger" in str(value).lower():
        return "liger"
    if "cut_cross_entropy" in str(value).lower():
        return None
    raise NoCounterpartError("plugins are not supported")


def _new_tokens(value: Any) -> Any:
    if isinstance(value, dict):
        raise NoCounterpartError("the special tokens are the model's own")
    return value


def _max_devices(value: Any) -> Any:
    devices = number(value)
    return devices if devices > 1 else None


def _excess(value: Any) -> Any:
    return "error" if value == "raise" else value


def _resources(value: Any) -> Any:
    if not isinstance(value, dict):
        raise NoCounterpartError("write `worker_resources: {CPU: 8}`")
    return {name: amount for name, amount in value.items() if (name, amount) != ("GPU", 1)} or None


def _cosine_floor(value: Any) -> Ours:
    return Ours(
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs.min_lr_rate": _fraction(value)}
    )


_NUMERIC = (_fraction, _count, _max_steps, _share, _warmup, _max_devices)
"""Conversions of a number to a number: a variable may stand for it."""


_NO_8BIT = (
    "8-bit base weights are not supported: write `load_in_4bit: true`, or leave it out for 16-bit weights"
)
_SHARE_OF_STEPS = (
    "or shares of the steps, 1 / (times per epoch x num_epochs), in `eval_steps` and `save_steps`"
)
_SHUFFLED = "rows are shuffled by `seed` in each epoch"
_KERNELS = "the kernels are chosen by `kernels`"
_AUTOMATIC = "it is chosen automatically"
_SAME_COMMAND = "run the same command again; a run resumes from its latest checkpoint"
_NF4 = "4-bit weights are bitsandbytes' NF4 with double quantization, computed in `dtype`"
_ENVIRONMENT = "the environment decides: the launcher is Ray"

TABLE: tuple[Counterpart, ...] = (
    # Model
    Counterpart("hl", "model_name_or_path", "model_id"),
    Counterpart("a", "base_model", "model_id"),
    Counterpart("t", "checkpointer.checkpoint_dir", "model_id"),
    Counterpart(
        "a",
        "revision_of_model",
        None,
        note="download the revision and name its directory in `model_id`",
        differs=True,
        same=("main",),
    ),
    Counterpart(
        "hl",
        "model_revision",
        None,
        note="download the revision and name its directory in `model_id`",
        differs=True,
        same=("main",),
    ),
    Counterpart("a", "tokenizer_config", None, note="the tokenizer is the model's own", differs=True),
    Counterpart("h", "tokenizer_name_or_path", None, note="the tokenizer is the model's own", differs=True),
    Counterpart("h", "tokenizer_name", None, note="the tokenizer is the model's own", differs=True),
    Counterpart(
        "a",
        "tokens",
        "new_tokens",
        _new_tokens,
    ),
    Counterpart("l", "add_tokens", "new_tokens", _names),
    Counterpart("l", "add_special_tokens", "new_special_tokens", _names),
    Counterpart("l", "resize_vocab", None, note="the embedding grows if new tokens need it"),
    Counterpart(
        "a", "special_tokens", None, note="the tokens are the model's own; padding is never in the loss"
    ),
    Counterpart(
        "hal", "attn_implementation", "flash_attention_2", _attention, "PyTorch's attention is the default"
    ),
    Counterpart("l", "flash_attn", "flash_attention_2", _attention, "PyTorch's attention is the default"),
    Counterpart(
        "a",
        "flash_attention",
        None,
        note="PyTorch's attention computes the same; `flash_attention_2: true` uses flash-attn",
    ),
    Counterpart("a", "sdp_attention", None, note="PyTorch's attention is the default"),
    Counterpart("l", "rope_scaling", None, note="the context is the model's own", differs=True),
    Counterpart("h", "pad_token", None, note="the token is the model's own; padding is never in the loss"),
    # Rows
    Counterpart("h", "dataset_name", "train_path", lambda value: hub_dataset(value)),
    Counterpart("a", "datasets", "train_path", _paths),
    Counterpart("a", "test_datasets", "valid_path", _paths),
    Counterpart(
        "a",
        "roles_to_train",
        None,
        note="the loss is on every assistant message; `turns: last` selects the last one",
        differs=True,
        same=(["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    ),
    Counterpart("h", "eos_token", None, note="the chat template's end marker ends each answer", differs=True),
    Counterpart(
        "a",
        "train_on_eos",
        None,
        note="the end marker of each assistant message is in the loss",
        differs=True,
        same=("turn",),
    ),
    Counterpart("a", "shuffle_merged_datasets", None, note=_SHUFFLED, differs=True, same=(True,)),
    Counterpart("t", "shuffle", None, note=_SHUFFLED, differs=True, same=(True,)),
    Counterpart("l", "disable_shuffling", None, note=_SHUFFLED, differs=True),
    Counterpart("hal", "data_seed", None, note="`seed` also orders the rows"),
    Counterpart(
        "l",
        "mix_strategy",
        None,
        note="sources are concatenated; `{path: ..., weight: ...}` in `train_path` mixes them",
        differs=True,
        same=("concat",),
    ),
    Counterpart(
        "h",
        "truncation_mode",
        None,
        note="a row that is too long keeps its start; `long_rows: drop` excludes it",
        differs=True,
        same=("keep_start",),
    ),
    Counterpart("l", "dataset", "train_path"),
    Counterpart("l", "eval_dataset", "valid_path"),
    Counterpart("t", "dataset", "train_path"),
    Counterpart("a", "pretraining_dataset", "train_path", note="with `task: causal_lm`"),
    Counterpart("h", "dataset_text_field", "columns.text"),
    Counterpart("a", "val_set_size", "valid_split", _share),
    Counterpart("h", "test_split_size", "valid_split", _share),
    Counterpart("l", "val_size", "valid_split", _share),
    Counterpart("l", "max_samples", "max_train_rows", _count),
    Counterpart("h", "max_train_samples", "max_train_rows", _count),
    Counterpart("h", "max_eval_samples", "max_valid_rows", _count),
    Counterpart("a", "eval_table_size", "eval_samples", _count),
    Counterpart("a", "sequence_len", "context_length"),
    Counterpart("l", "cutoff_len", "context_length"),
    Counterpart("h", "max_length", "context_length"),
    Counterpart("h", "max_seq_length", "context_length"),
    Counterpart("t", "tokenizer.max_seq_len", "context_length"),
    Counterpart(
        "h",
        "max_prompt_length",
        None,
        note="`context_length` limits prompt and answer together",
        differs=True,
    ),
    Counterpart(
        "h",
        "max_completion_length",
        None,
        note="`context_length` limits prompt and answer together",
        differs=True,
    ),
    Counterpart(
        "a",
        "excess_length_strategy",
        "long_rows",
        _excess,
    ),
    Counterpart("a", "sample_packing", "packing", bool),
    Counterpart(
        "h",
        "packing_strategy",
        None,
        note="`packing: true` packs rows by best fit",
        differs=True,
        same=("bfd", "ffd"),
    ),
    Counterpart("l", "neat_packing", "packing", bool),
    Counterpart("t", "dataset.packed", "packing", bool),
    Counterpart(
        "a",
        "eval_sample_packing",
        None,
        note="validation rows are packed as training rows are; the loss is the same",
    ),
    Counterpart(
        "a",
        "pad_to_sequence_len",
        None,
        note="padding does not change the loss; `padding: max_length` pads every batch",
    ),
    Counterpart(
        "l",
        "template",
        None,
        note="the model's own chat template is used; name another in `chat_template`",
        differs=True,
    ),
    Counterpart("a", "chat_template_jinja", "chat_template"),
    Counterpart("h", "chat_template_path", "chat_template"),
    Counterpart(
        "a", "default_system_message", None, note="write the system message into the rows", differs=True
    ),
    Counterpart("l", "default_system", None, note="write the system message into the rows", differs=True),
    Counterpart("l", "enable_thinking", "chat_template_kwargs.enable_thinking"),
    Counterpart("a", "train_on_inputs", "task", _if("causal_lm", "instruction_tuning")),
    Counterpart("l", "train_on_prompt", "task", _if("causal_lm")),
    Counterpart("t", "dataset.train_on_input", "task", _if("causal_lm", "instruction_tuning")),
    Counterpart("l", "mask_history", "turns", _if("last")),
    Counterpart("h", "completion_only_loss", "task", _if("instruction_tuning", "causal_lm")),
    Counterpart("h", "assistant_only_loss", "task", _if("instruction_tuning", "causal_lm")),
    Counterpart("hal", "group_by_length", None, note="rows of similar length always share a step"),
    Counterpart("hal", "streaming", None, note="rows are tokenized once and memory-mapped"),
    # Length and batch
    Counterpart("hl", "num_train_epochs", "num_epochs"),
    Counterpart("t", "epochs", "num_epochs"),
    Counterpart("hal", "max_steps", "max_steps", _max_steps),
    Counterpart("t", "max_steps_per_epoch", None, note="use `max_steps`, or `max_train_rows`", differs=True),
    Counterpart("hl", "per_device_train_batch_size", "train_batch_size_per_device"),
    Counterpart("a", "micro_batch_size", "train_batch_size_per_device"),
    Counterpart("t", "batch_size", "train_batch_size_per_device"),
    Counterpart(
        "a",
        "batch_size",
        "train_batch_size",
        lambda value: Ours({"train_batch_size": number(value), "train_batch_size_per_device": "auto"}),
    ),
    Counterpart("hl", "per_device_eval_batch_size", "eval_batch_size_per_device"),
    Counterpart("a", "eval_batch_size", "eval_batch_size_per_device"),
    Counterpart("t", "batch_size_val", "eval_batch_size_per_device"),
    Counterpart(
        "hal",
        "auto_find_batch_size",
        None,
        note="`train_batch_size_per_device: auto` with `train_batch_size` estimates it",
    ),
    # Optimizer
    Counterpart("a", "optimizer", "optim", _optimizer),
    Counterpart("hl", "optim", "optim", _optimizer),
    Counterpart("t", "optimizer._component_", "optim", _optimizer),
    Counterpart("t", "optimizer.lr", "learning_rate"),
    Counterpart("t", "optimizer.weight_decay", "weight_decay"),
    Counterpart("hl", "lr_scheduler_type", "lr_scheduler_type", _scheduler),
    Counterpart("a", "lr_scheduler", "lr_scheduler_type", _scheduler),
    Counterpart("t", "lr_scheduler._component_", "lr_scheduler_type", _scheduler),
    Counterpart("t", "lr_scheduler.num_warmup_steps", "num_warmup_steps"),
    Counterpart("hal", "warmup_steps", "num_warmup_steps", _warmup),
    Counterpart("hal", "warmup_ratio", "warmup_ratio", _count),
    Counterpart(
        "a",
        "cosine_min_lr_ratio",
        "lr_scheduler_kwargs.min_lr_rate",
        _cosine_floor,
    ),
    Counterpart("t", "clip_grad_norm", "max_grad_norm"),
    Counterpart(
        "h",
        "optim_args",
        None,
        note="write `adam_beta1`, `adam_beta2` and `adam_epsilon`",
        differs=True,
    ),
    Counterpart("hal", "neftune_noise_alpha", None, note="NEFTune is not supported", differs=True),
    Counterpart("h", "label_smoothing_factor", None, note="label smoothing is not supported", differs=True),
    Counterpart("al", "loraplus_lr_ratio", None, note="LoRA+ is not supported", differs=True),
    Counterpart("a", "embedding_lr", None, note="all weights have one learning rate", differs=True),
    Counterpart(
        "a",
        "unfrozen_parameters",
        None,
        note="use LoRA with `modules_to_save`, or full-parameter training",
        differs=True,
    ),
    Counterpart("l", "early_stopping_steps", "early_stopping_patience"),
    # Precision and memory
    Counterpart("hal", "bf16", "dtype", _bf16),
    Counterpart("l", "pure_bf16", "dtype", _if("bf16"), "trainable weights stay in fp32"),
    Counterpart("hal", "fp16", "dtype", _fp16),
    Counterpart("a", "float16", "dtype", _fp16),
    Counterpart("a", "float32", "dtype", _if("fp32")),
    Counterpart("hal", "tf32", None, note=_AUTOMATIC),
    Counterpart("ht", "dtype", "dtype", _dtype),
    Counterpart("h", "torch_dtype", "dtype", _dtype),
    Counterpart("hal", "load_in_8bit", "load_in_4bit", _8bit, differs=True),
    Counterpart("l", "quantization_bit", "load_in_4bit", _quantization_bit),
    Counterpart("l", "quantization_type", None, note=_NF4, differs=True, same=("nf4",)),
    Counterpart("l", "quantization_method", None, note=_NF4, differs=True, same=("bnb", "bitsandbytes")),
    Counterpart("l", "double_quantization", None, note=_NF4, differs=True, same=(True,)),
    Counterpart(
        "a",
        "bnb_config_kwargs",
        None,
        note=_NF4,
        differs=True,
        same=({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},),
    ),
    Counterpart("h", "bnb_4bit_quant_type", None, note=_NF4, differs=True, same=("nf4",)),
    Counterpart("h", "use_bnb_nested_quant", None, note=_NF4, differs=True, same=(True,)),
    Counterpart(
        "h", "bnb_4bit_compute_dtype", None, note=_NF4, differs=True, same=("bfloat16", "bf16", "auto")
    ),
    Counterpart("hal", "gradient_checkpointing", "gradient_checkpointing", _checkpointing),
    Counterpart("l", "disable_gradient_checkpointing", "gradient_checkpointing", lambda value: not value),
    Counterpart("t", "enable_activation_checkpointing", "gradient_checkpointing", bool),
    Counterpart("hal", "gradient_checkpointing_kwargs", None, note=_AUTOMATIC),
    Counterpart("hal", "activation_offloading", None, note="`gradient_checkpointing` saves this memory"),
    Counterpart("hal", "deepspeed", "deepspeed", deepspeed_setting),
    Counterpart(
        "ha",
        "fsdp",
        "deepspeed",
        _fsdp,
        "DeepSpeed ZeRO-3 shards weights, gradients and optimizer as FSDP does",
    ),
    Counterpart(
        "ha",
        "fsdp_config",
        "deepspeed",
        _fsdp,
        "DeepSpeed ZeRO-3 shards weights, gradients and optimizer as FSDP does",
    ),
    Counterpart("a", "plugins", "kernels", _plugins),
    Counterpart("h", "use_liger_kernel", "kernels", _if("liger")),
    Counterpart("l", "enable_liger_kernel", "kernels", _if("liger")),
    Counterpart("l", "use_unsloth", "kernels", _if("unsloth")),
    Counterpart("hat", "torch_compile", None, note=_KERNELS),
    Counterpart("t", "compile", None, note=_KERNELS),
    Counterpart("a", "cut_cross_entropy", None, note=_KERNELS),
    Counterpart("a", "fused_attn_kernel", None, note=_KERNELS),
    Counterpart("a", "use_kernels", None, note=_KERNELS),
    # LoRA
    Counterpart(
        "a",
        "adapter",
        "lora_config",
        _adapter,
    ),
    Counterpart(
        "l", "finetuning_type", "lora_config", _adapter, "without `lora_config` all weights are trained"
    ),
    Counterpart("h", "use_peft", "lora_config", _if({}), "without `lora_config` all weights are trained"),
    Counterpart("ha", "lora_r", "lora_config.r"),
    Counterpart("l", "lora_rank", "lora_config.r"),
    Counterpart("t", "model.lora_rank", "lora_config.r"),
    Counterpart("hal", "lora_alpha", "lora_config.lora_alpha"),
    Counterpart("hal", "lora_dropout", "lora_config.lora_dropout", _fraction),
    Counterpart("ha", "lora_target_modules", "lora_config.target_modules", _names),
    Counterpart("l", "lora_target", "lora_config.target_modules", _names),
    Counterpart("ha", "lora_target_parameters", "lora_config.target_parameters"),
    Counterpart("a", "lora_target_linear", "lora_config.target_modules", _if("all-linear")),
    Counterpart("ha", "lora_modules_to_save", "lora_config.modules_to_save"),
    Counterpart("h", "lora_task_type", "lora_config.task_type"),
    Counterpart("l", "additional_target", "lora_config.modules_to_save", _names),
    Counterpart("a", "peft_use_dora", "lora_config.use_dora"),
    Counterpart("a", "peft_use_rslora", "lora_config.use_rslora"),
    Counterpart("hl", "use_dora", "lora_config.use_dora"),
    Counterpart("hl", "use_rslora", "lora_config.use_rslora"),
    Counterpart("a", "lora_fan_in_fan_out", "lora_config.fan_in_fan_out"),
    Counterpart("a", "lora_model_dir", "initial_adapter_model_ckpt_path"),
    Counterpart("l", "adapter_name_or_path", "initial_adapter_model_ckpt_path"),
    # Preferences
    Counterpart("a", "rl", "task", _rl),
    Counterpart("l", "stage", "task", _stage),
    Counterpart("h", "beta", "preference_tuning_config.beta", _fraction),
    Counterpart("a", "rl_beta", "preference_tuning_config.beta", _fraction),
    Counterpart("l", "pref_beta", "preference_tuning_config.beta", _fraction),
    Counterpart("l", "pref_loss", "preference_tuning_config.loss", _loss),
    Counterpart("h", "loss_type", "preference_tuning_config.loss", _loss),
    Counterpart("a", "orpo_alpha", "preference_tuning_config.beta", _fraction),
    # Evaluation, checkpoints, results
    Counterpart(
        "h", "eval_delay", None, note="the first evaluation is after the first `eval_steps`", differs=True
    ),
    Counterpart("hl", "eval_on_start", "eval_first", bool),
    Counterpart(
        "hal",
        "eval_strategy",
        "eval_steps",
        _eval_strategy,
        "without `valid_path` or `valid_split` nothing is evaluated",
        same=("steps",),
    ),
    Counterpart(
        "hl",
        "evaluation_strategy",
        "eval_steps",
        _eval_strategy,
        "without `valid_path` or `valid_split` nothing is evaluated",
        same=("steps",),
    ),
    Counterpart(
        "hal",
        "save_strategy",
        "save_steps",
        _eval_strategy,
        "the last step always has a checkpoint",
        same=("steps",),
    ),
    Counterpart("a", "evals_per_epoch", "checkpoint_and_evaluation_frequency", _per_epoch, _SHARE_OF_STEPS),
    Counterpart("a", "saves_per_epoch", "checkpoint_and_evaluation_frequency", _per_epoch, _SHARE_OF_STEPS),
    Counterpart(
        "hal",
        "save_total_limit",
        "num_checkpoints_to_keep",
        _count,
        "the best by eval loss are kept, and the latest",
    ),
    Counterpart(
        "hal", "load_best_model_at_end", None, note="export, chat and evaluate use the best checkpoint"
    ),
    Counterpart(
        "hal",
        "metric_for_best_model",
        None,
        note="the best checkpoint has the lowest eval loss",
        differs=True,
        same=("loss", "eval_loss"),
    ),
    Counterpart(
        "halt",
        "resume_from_checkpoint",
        None,
        note="checkpoints of other tools cannot be resumed; a run resumes from its own latest one with the same command",
        differs=True,
        same=(True, False),
    ),
    Counterpart("a", "auto_resume_from_checkpoints", None, note=_SAME_COMMAND),
    Counterpart(
        "halt",
        "output_dir",
        "storage_path",
        note="`output_dir` is a scratch directory here; results are stored under `storage_path`",
    ),
    Counterpart("l", "ray_storage_path", "storage_path"),
    Counterpart("al", "ray_run_name", "run_name"),
    Counterpart("hal", "logging_steps", None, note="every step is logged"),
    Counterpart("hl", "report_to", "logger.provider", _tracker),
    Counterpart(
        "a",
        "wandb_project",
        "logger.project",
        lambda value: Ours({"logger.provider": "wandb", "logger.project": value}),
    ),
    Counterpart(
        "a",
        "wandb_entity",
        "logger.entity",
        lambda value: Ours({"logger.provider": "wandb", "logger.entity": value}),
    ),
    Counterpart("a", "wandb_name", "logger.name"),
    Counterpart(
        "a",
        "mlflow_tracking_uri",
        "logger.tracking_uri",
        lambda value: Ours({"logger.provider": "mlflow", "logger.tracking_uri": value}),
    ),
    Counterpart(
        "a",
        "mlflow_experiment_name",
        "logger.experiment_name",
        lambda value: Ours({"logger.provider": "mlflow", "logger.experiment_name": value}),
    ),
    Counterpart("a", "use_tensorboard", "logger.provider", _if("tensorboard")),
    Counterpart(
        "a", "hub_model_id", "hub_model_id", lambda value: Ours({"push_to_hub": True, "hub_model_id": value})
    ),
    Counterpart("hal", "hub_token", None, note="the token comes from HF_TOKEN in the environment"),
    Counterpart("h", "hub_strategy", None, note="the result is pushed once, after the run has completed"),
    Counterpart("hal", "save_safetensors", None, note="weights are always stored as safetensors"),
    Counterpart("hal", "save_only_model", None, note="checkpoints are complete, so that a run can resume"),
    # Workers
    Counterpart("al", "ray_num_workers", "num_devices", _max_devices),
    Counterpart(
        "al",
        "resources_per_worker",
        "worker_resources",
        _resources,
    ),
    Counterpart("t", "device", "device", lambda value: "cpu" if value == "cpu" else None),
    Counterpart("hl", "use_cpu", "device", _if("cpu")),
    Counterpart("a", "use_ray", None, note="every run is a Ray job"),
    Counterpart("a", "context_parallel_size", "sequence_parallel_size", _max_devices),
    Counterpart("t", "context_parallel_dim", "sequence_parallel_size", _max_devices),
    Counterpart(
        "t",
        "tensor_parallel_dim",
        None,
        note="use `deepspeed: zero_3` for models that do not fit on one device",
        same=(1,),
    ),
    Counterpart(
        "a",
        "tensor_parallel_size",
        None,
        note="use `deepspeed: zero_3` for models that do not fit on one device",
        same=(1,),
    ),
)

NOT_NEEDED = {  # reason -> keys
    "`num_devices` counts the devices of all nodes": "num_nodes nnodes num_machines",
    _ENVIRONMENT: "local_rank world_size ddp ddp_timeout ddp_find_unused_parameters device_map ddp_bucket_cap_mb ddp_backend dp_shard_size "
    "dp_replicate_size data_parallel_shard_dim data_parallel_replicate_dim accelerator_config parallelism_config ray_init_kwargs",
    "rows are tokenized once and cached with the run": (
        "dataset_prepared_path dataset_processes dataset_num_proc preprocessing_num_workers overwrite_cache dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor remove_unused_columns dataset_keep_in_memory tokenized_path"
    ),
    "AutoModel and AutoTokenizer choose it": (
        "model_type tokenizer_type processor_type tokenizer_use_fast use_fast_tokenizer tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model"
    ),
    "the command says it": "do_train do_eval do_predict overwrite_output_dir is_preprocess",
    "a NaN or infinite loss always ends the run": "logging_nan_inf_filter",
    "the report shows it": "plot_loss log_every_n_steps log_level log_peak_memory_stats logging_first_step logging_dir disable_tqdm "
    "logging_strategy include_tokens_per_second include_num_input_tokens_seen profiler metric_logger",
    "it is not used": "strict debug wandb_watch wandb_log_model wandb_run_id wandb_mode use_wandb use_mlflow save_first_step hub_strategy "
    "hf_use_auth_token xformers_attention lora_on_cpu fsdp_version low_cpu_mem_usage loss save_adapter_weights_only "
    "enable_activation_offloading ray_scheduler eot_tokens experimental_skip_move_to_device greater_is_better dataloader_drop_last gc_steps eval_accumulation_steps batch_eval_metrics torch_empty_cache_steps enable_jit_checkpoint "
    "restore_callback_states_from_checkpoint label_names precompute_ref_batch_size prediction_loss_only",
    "validation rows are packed as training rows are": "eval_packing",
    "padding is never in the loss": "padding_free",
    _KERNELS: "liger_kernel_config",
}

SAME_NAME = frozenset(
    name
    for name in FinetuneConfig.model_fields
    if name not in {"output_dir", "resume_from_checkpoint", "columns", "logger", "export"}
)
"""Keys that mean the same in every tool that has them, unless the table says otherwise."""


def hub_dataset(name: Any, config: str | None = None, split: str | None = None) -> str:
    """Return the URI of a Hub dataset."""
    middle = f"/{config}" if config else ""
    return f"hf://datasets/{name}{middle}" + (f"?split={split}" if split and split != "train" else "")


def find(key: str, tool: Tool | None = None) -> Counterpart | None:
    """Return the counterpart of a key: of this tool, or of the first tool that has the key."""
    rows = [row for row in TABLE if row.theirs == key]
    if tool is not None:
        rows = [row for row in rows if tool in tools_of(row)]
    if rows:
        return rows[0]
    reason = next((reason for reason, keys in NOT_NEEDED.items() if key in keys.split()), None)
    return Counterpart("halt", key, None, note=reason) if reason else None


def keys_of(tool: Tool) -> list[str]:
    """Return the keys of a tool that have a counterpart, or need none."""
    own = [row.theirs for row in TABLE if tool in tools_of(row)]
    return [*own, *SAME_NAME, *" ".join(NOT_NEEDED.values()).split()]


def tools_of(row: Counterpart) -> list[Tool]:
    """Return the tools that have the row's key."""
    return [_LETTERS[letter] for letter in row.tools]


def detect(data: Mapping[str, Any]) -> Tool | None:
    """Return the tool that a YAML was written for; None if its keys are ours or unknown."""
    if any(isinstance(value, dict) and "_component_" in value for value in data.values()):
        return "torchtune"
    if "base_model" in data or {"micro_batch_size", "sequence_len"} <= data.keys():
        return "axolotl"
    if data.keys() & {"finetuning_type", "cutoff_len", "lora_rank", "dataset_dir", "val_size"}:
        return "llamafactory"
    own = {row.theirs for row in TABLE if "huggingface" in tools_of(row)} - set(FinetuneConfig.model_fields)
    return "huggingface" if data.keys() & own else None
