"""Choice of kernels: a compatibility table, from which `auto` chooses and which docs/kernels.md shows."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from configs.schema import FinetuneConfig, LoraConfig
from configs.sequence_parallel import EXCLUSIONS, KEY
from training.models.files import ModelError

Device = Literal["cuda", "cpu"]
COLLECTIVE_BACKENDS: dict[Device, str] = {"cuda": "nccl", "cpu": "gloo"}
"""torch.distributed's backend on each device."""

Provider = Literal["unsloth", "liger", "torch"]
WeightsDtype = Literal["bf16", "fp32"]
Method = Literal["LoRA", "QLoRA", "full"]

SPREADS = ("one worker", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "sequence parallel")
"""Kinds of parallelism, the columns of the table. Sequence parallel goes with DDP and each ZeRO stage that has no error."""

TESTED, ON_GPU, UNTESTED = _WORKS = "T", "G", "·"

_NO_GPU = "its Triton kernels need a GPU, but the run is on CPU"
_UNSHARDED = "Unsloth does not shard weights (ZeRO-3)"
_4BIT = "ZeRO-3 cannot shard 4-bit weights"
_ATTENTION = f"{EXCLUSIONS['`kernels: unsloth`'].reason} ({KEY})"

# For each method and spread: tested (on CPU), compared with CPU on a GPU (part `step` of the GPU benchmark), untested on a GPU, or the
# reason for the error.
COMPATIBILITY: dict[tuple[Provider, Device], dict[Method, tuple[str, str, str, str, str, str]]] = {
    ("torch", "cpu"): {
        "LoRA": (TESTED, TESTED, TESTED, TESTED, TESTED, TESTED),
        "full": (TESTED, TESTED, TESTED, TESTED, TESTED, TESTED),
        "QLoRA": (TESTED, TESTED, TESTED, TESTED, _4BIT, TESTED),
    },
    ("torch", "cuda"): {
        "LoRA": (ON_GPU, UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _4BIT, UNTESTED),
    },
    ("unsloth", "cpu"): {
        "LoRA": (TESTED, TESTED, TESTED, TESTED, _UNSHARDED, _ATTENTION),
        "full": (TESTED, TESTED, TESTED, TESTED, _UNSHARDED, _ATTENTION),
        "QLoRA": (TESTED, TESTED, TESTED, TESTED, _UNSHARDED, _ATTENTION),
    },
    ("unsloth", "cuda"): {
        "LoRA": (ON_GPU, UNTESTED, UNTESTED, UNTESTED, _UNSHARDED, _ATTENTION),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _UNSHARDED, _ATTENTION),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _UNSHARDED, _ATTENTION),
    },
    ("liger", "cpu"): {
        "LoRA": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
        "full": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
        "QLoRA": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
    },
    ("liger", "cuda"): {
        "LoRA": (ON_GPU, UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _4BIT, UNTESTED),
    },
}

UNSLOTH_LORA_FIELDS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "modules_to_save",
        "bias",
        "use_rslora",
    }
)
"""Keys of lora_config that Unsloth's loader accepts; other keys are an error."""
_READ_BY_PEFT = frozenset(
    {
        "init_lora_weights",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    }
)
"""Keys of a continued adapter that only select its matrices and their scales. PEFT reads them when Unsloth loads the adapter."""

# Unsloth uses the first that is installed, without deterministic gradients.
_ATTENTION_OF_UNSLOTH = ("flash_attn", "xformers")
# Order of `auto`, each with its reason: it takes the first that is compatible with the run and installed.
_PREFERRED: dict[Device, tuple[tuple[Provider, str], ...]] = {
    "cpu": (("torch", "Triton kernels do not run on CPU"),),
    "cuda": (("unsloth", "the fastest with one GPU per worker"), ("liger", ""), ("torch", "")),
}


@dataclass(frozen=True)
class KernelChoice:
    """The provider of the kernels, and the reason for the choice, which the plan prints."""

    provider: Provider
    reason: str


def device_here() -> Device:
    """Return the device on which a model runs in this process: the first GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_kernels(
    config: FinetuneConfig,
    device: Device,
    stage: int,
    *,
    continued: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
    exceeded_rope: int | None = None,
) -> KernelChoice:
    """Resolve `kernels` for this run; reject kernels that cannot train it.

    Args:
        config: The YAML.
        device: The device to train on.
        stage: ZeRO stage; 0 without ZeRO.
        continued: The configuration of the adapter to continue, once it has been read.
        elsewhere: Whether the run trains in another environment, where a package that is missing here is no error.
        exceeded_rope: See `exceeded_rope_of_unsloth` in training/models/attention.py.
    """
    asked = config.kernels
    why_not = partial(
        _why_not, config=config, device=device, stage=stage, continued=continued, exceeded_rope=exceeded_rope
    )
    if asked == "auto":
        return _choose(device, why_not)
    if reason := why_not(asked):
        others = [name for name in get_args(Provider) if not why_not(name)]
        advice = (
            f"kernels: auto or {' or '.join(others)}"
            if others
            else "deepspeed: zero_2, or load_in_4bit: false"
        )
        raise ModelError(f"kernels: {asked}: {reason}. Write {advice}.")
    if asked == "unsloth" and not elsewhere and not is_installed("unsloth"):
        raise ModelError(
            "kernels: unsloth: Unsloth is not installed. Install it with `make setup-unsloth` (parts of it are licensed under AGPL-3.0)."
        )
    in_cpu_mode = asked == "unsloth" and device == "cpu"
    return KernelChoice(asked, "set by `kernels`" + (", in its CPU mode" if in_cpu_mode else ""))


def _choose(device: Device, why_not: Callable[[Provider], str | None]) -> KernelChoice:
    skipped = []
    for provider, advantage in _PREFERRED[device]:
        reason = why_not(provider)
        if reason is None and provider == "unsloth" and not is_installed("unsloth"):
            reason = "Unsloth is not installed (make setup-unsloth)"
        if reason is None:
            return KernelChoice(provider, f"auto: {', and '.join(skipped) or advantage}")
        skipped.append(reason)
    raise ModelError(f"kernels: auto: {skipped[-1]}. Write deepspeed: zero_2, or load_in_4bit: false.")


def _why_not(
    provider: Provider,
    config: FinetuneConfig,
    device: Device,
    stage: int,
    continued: Mapping[str, Any] | None,
    exceeded_rope: int | None,
) -> str | None:
    method: Method = "QLoRA" if config.load_in_4bit else "LoRA" if config.trains_adapter else "full"
    spread = f"ZeRO-{stage}" if stage else "DDP" if config.most_devices > 1 else "one worker"
    spreads = [spread, *(["sequence parallel"] if config.sequence_parallel_size > 1 else [])]
    for spread in spreads:
        cell = COMPATIBILITY[provider, device][method][SPREADS.index(spread)]
        if cell not in _WORKS:
            return cell
    where = "lora_config." if continued is None else "the continued adapter's "
    if provider == "unsloth" and (unknown := _keys_without_unsloth(config, continued)):
        return f"Anneal does not support {' and '.join(f'{where}{name}' for name in unknown)} with Unsloth"
    if provider == "unsloth" and device == "cuda" and config.dtype == "fp32":
        # Unsloth's trainer enables autocast if neither bf16 nor fp16 is set.
        return "Unsloth computes in 16 bits on a GPU, also with dtype: fp32"
    if provider == "unsloth" and (others := _modules_to_save_without_unsloth(config, continued)):
        return f"Unsloth does not train {' and '.join(others)} of {where}modules_to_save, only embed_tokens, lm_head and norms"
    if provider == "unsloth" and device == "cuda" and config.trains_adapter and exceeded_rope is not None:
        return (
            f"Unsloth changes the RoPE of this model if sequences may have more than {exceeded_rope:,} tokens (context_length), unlike chat, "
            "exports and servers"
        )
    packages = [package for package in _ATTENTION_OF_UNSLOTH if is_installed(package)]
    if provider == "unsloth" and device == "cuda" and config.deterministic and packages:
        return f"Unsloth's attention would use {packages[0]}, whose gradients are not deterministic"
    if provider == "unsloth" and config.packing:
        return "Unsloth's attention does not separate packed rows"
    if provider == "unsloth" and config.eval_samples is not None:
        return "Unsloth's generation switches the model to other kernels, and Anneal does not support it for eval_samples"
    if provider == "unsloth" and config.added_tokens:
        return "Anneal does not support new_tokens with Unsloth, whose loaders add no rows to an embedding"
    if provider == "unsloth" and config.task == "preference_tuning":
        return "preference tuning needs log-probabilities, but Unsloth's forward pass returns only a loss"
    return None


def offloads_activations(
    checkpointing: bool | Literal["unsloth"], lora: LoraConfig | None, sequence_tokens: int
) -> bool:
    """Return whether Unsloth offloads the layers' inputs to host memory.

    It does not below 512 tokens (`apply_unsloth_gradient_checkpointing` in unsloth/models/_utils.py). Anneal does not enable it
    with modules_to_save, since Unsloth would then write embeddings to a file beside the model, which workers share.

    Args:
        checkpointing: The YAML's gradient_checkpointing.
        lora: Configuration of a new adapter, if there is one.
        sequence_tokens: Tokens of the longest sequence, padding included.
    """
    return (
        checkpointing == "unsloth"
        and sequence_tokens >= 512
        and not (lora is not None and lora.modules_to_save)
    )


def _keys_without_unsloth(config: FinetuneConfig, continued: Mapping[str, Any] | None) -> list[str]:
    """Return the settings of the adapter that Unsloth's loader does not take, or whose weights it leaves untrained."""
    settings = _adapter_settings(config, continued)
    others = LoraConfig.model_fields.keys() - UNSLOTH_LORA_FIELDS - {"task_type"}
    if continued is not None:
        others -= _READ_BY_PEFT
    defaults = {name: LoraConfig.model_fields[name].default for name in others}
    return sorted(name for name in others if settings.get(name) and settings[name] != defaults[name])


def _modules_to_save_without_unsloth(
    config: FinetuneConfig, continued: Mapping[str, Any] | None
) -> list[str]:
    named = _adapter_settings(config, continued).get("modules_to_save") or []
    return [
        name
        for name in named
        if name.split(".")[-1] not in ("embed_tokens", "lm_head") and not name.endswith("norm")
    ]


def _adapter_settings(config: FinetuneConfig, continued: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the adapter's settings: its own if it is continued, whatever the YAML's lora_config has as defaults."""
    if continued is not None or config.initial_adapter_model_ckpt_path:
        return continued or {}
    return config.lora_config.model_dump() if config.lora_config else {}


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
