"""Which kernels a run takes: one table of what goes together, from which `auto` chooses and which the README shows."""

import importlib.util
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from configs.schema import FinetuneConfig, LoraConfig
from training.models.files import ModelError

Device = Literal["cuda", "cpu"]
Provider = Literal["unsloth", "liger", "torch"]
WeightsDtype = Literal["bf16", "fp32"]
Method = Literal["LoRA", "QLoRA", "full"]

SPREADS = ("one worker", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
"""How a run lies over devices; the columns of the table."""

TESTED, UNTESTED = "T", "·"

_NO_GPU = "its Triton kernels need a GPU, and the run is on CPU"
_WHOLE_WEIGHTS = "Unsloth does not split weights (ZeRO-3)"
_4BIT = "ZeRO-3 cannot split 4-bit weights"

# Of each method, for each spread: tested (on CPU), untested (no GPU was at hand), or why not.
COMPATIBILITY: dict[tuple[Provider, Device], dict[Method, tuple[str, str, str, str, str]]] = {
    ("torch", "cpu"): {
        "LoRA": (TESTED, TESTED, TESTED, TESTED, TESTED),
        "full": (TESTED, TESTED, TESTED, TESTED, TESTED),
        "QLoRA": (TESTED, TESTED, TESTED, TESTED, _4BIT),
    },
    ("torch", "cuda"): {
        "LoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _4BIT),
    },
    ("unsloth", "cpu"): {
        "LoRA": (TESTED, TESTED, TESTED, TESTED, _WHOLE_WEIGHTS),
        "full": (TESTED, TESTED, TESTED, TESTED, _WHOLE_WEIGHTS),
        "QLoRA": (TESTED, TESTED, TESTED, TESTED, _WHOLE_WEIGHTS),
    },
    ("unsloth", "cuda"): {
        "LoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _WHOLE_WEIGHTS),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _WHOLE_WEIGHTS),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _WHOLE_WEIGHTS),
    },
    ("liger", "cpu"): {
        "LoRA": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
        "full": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
        "QLoRA": (_NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU, _NO_GPU),
    },
    ("liger", "cuda"): {
        "LoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "full": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, UNTESTED),
        "QLoRA": (UNTESTED, UNTESTED, UNTESTED, UNTESTED, _4BIT),
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
"""What its loader is handed of a lora_config; whatever else it says is refused, not dropped."""

_ATTENTION_OF_UNSLOTH = (
    "flash_attn",
    "xformers",
)  # the first that is installed; it asks neither for equal bits
# What `auto` takes: the first that goes with the run and is installed; with what is said for it.
_PREFERRED: dict[Device, tuple[tuple[Provider, str], ...]] = {
    "cpu": (("torch", "on CPU there is nothing for Triton kernels to speed up"),),
    "cuda": (("unsloth", "the fastest on one GPU a worker"), ("liger", ""), ("torch", "")),
}


@dataclass(frozen=True)
class KernelChoice:
    """The provider, and why it was taken: printed in the plan."""

    provider: Provider
    reason: str


def choose_kernels(config: FinetuneConfig, device: Device, stage: int) -> KernelChoice:
    """What `kernels` means for this run on this device, under this ZeRO stage (0: plain data parallelism).

    Raises:
        ModelError: the kernels that were asked for cannot serve the run, or are not installed.
    """
    asked = config.kernels
    if asked == "auto":
        return _choose(config, device, stage)
    if reason := _why_not(asked, config, device, stage):
        others = [name for name in get_args(Provider) if not _why_not(name, config, device, stage)]
        advice = (
            f"kernels: auto or {' or '.join(others)}"
            if others
            else "deepspeed: zero_2, or load_in_4bit: false"
        )
        raise ModelError(f"kernels: {asked}: {reason}. Write {advice}.")
    if asked == "unsloth" and not _installed("unsloth"):
        raise ModelError(
            "kernels: unsloth: Unsloth is not installed. `make setup-unsloth` installs it (its licence: see README)."
        )
    in_cpu_mode = asked == "unsloth" and device == "cpu"
    return KernelChoice(asked, "asked for" + (", in its CPU mode" if in_cpu_mode else ""))


def _choose(config: FinetuneConfig, device: Device, stage: int) -> KernelChoice:
    passed_over = []
    for provider, praise in _PREFERRED[device]:
        reason = _why_not(provider, config, device, stage)
        if reason is None and provider == "unsloth" and not _installed("unsloth"):
            reason = "Unsloth is not installed (make setup-unsloth)"
        if reason is None:
            return KernelChoice(provider, f"auto: {', and '.join(passed_over) or praise}")
        passed_over.append(reason)
    raise ModelError(f"kernels: auto: {passed_over[-1]}. Write deepspeed: zero_2, or load_in_4bit: false.")


def _why_not(provider: Provider, config: FinetuneConfig, device: Device, stage: int) -> str | None:
    method: Method = "QLoRA" if config.load_in_4bit else "LoRA" if config.trains_adapter else "full"
    spread = f"ZeRO-{stage}" if stage else "DDP" if config.most_devices > 1 else "one worker"
    cell = COMPATIBILITY[provider, device][method][SPREADS.index(spread)]
    if cell not in (TESTED, UNTESTED):
        return cell
    if provider == "unsloth" and (unknown := _unknown_to_unsloth(config)):
        return f"Unsloth's adapters are made here without {' and '.join(f'lora_config.{name}' for name in unknown)}"
    if provider == "unsloth" and device == "cuda" and config.dtype == "fp32":
        # Its trainer turns autocast on where neither bf16 nor fp16 is asked for.
        return "Unsloth computes in 16 bits on a GPU, whatever dtype says"
    if provider == "unsloth" and (others := _trained_whole_but_not_by_unsloth(config)):
        return f"Unsloth trains embed_tokens, lm_head and norms whole, but not {' and '.join(others)} (lora_config.modules_to_save)"
    packages = [package for package in _ATTENTION_OF_UNSLOTH if _installed(package)]
    if provider == "unsloth" and device == "cuda" and config.deterministic and packages:
        return f"Unsloth's attention would be by {packages[0]}, whose gradients differ from run to run (deterministic)"
    if provider == "unsloth" and config.packing:
        return "Unsloth's attention lets packed rows see one another"
    if provider == "unsloth" and config.task == "preference_tuning":
        return "preference tuning compares log-probabilities, and Unsloth's forward pass gives a loss"
    return None


def offloads_activations(
    checkpointing: bool | Literal["unsloth"], lora: LoraConfig | None, sequence_tokens: int
) -> bool:
    """Whether Unsloth keeps the layers' inputs in the host's memory.

    Not below 512 tokens (`apply_unsloth_gradient_checkpointing` in unsloth/models/_utils.py); and with modules that are trained whole it
    would put embeddings into a file beside the model's, which workers share, and is not asked to.

    Args:
        checkpointing: The YAML's gradient_checkpointing.
        lora: A new adapter, if there is one.
        sequence_tokens: Of the longest sequence, with its padding.
    """
    return (
        checkpointing == "unsloth"
        and sequence_tokens >= 512
        and not (lora is not None and lora.modules_to_save)
    )


def _unknown_to_unsloth(config: FinetuneConfig) -> list[str]:
    if config.initial_adapter_model_ckpt_path:
        return []  # it is loaded as it is
    lora = config.lora_config
    others = LoraConfig.model_fields.keys() - UNSLOTH_LORA_FIELDS - {"task_type"}
    return sorted(
        name for name in others if lora and getattr(lora, name) != LoraConfig.model_fields[name].default
    )


def _trained_whole_but_not_by_unsloth(config: FinetuneConfig) -> list[str]:
    named = (config.lora_config.modules_to_save if config.lora_config else None) or []
    return [
        name
        for name in named
        if name.split(".")[-1] not in ("embed_tokens", "lm_head") and not name.endswith("norm")
    ]


def compatibility_as_markdown() -> str:
    """The table for people: methods that stand alike share a row, and what is refused is a dash."""
    refused = "–"  # noqa: RUF001
    lines = [f"| kernels | device | method | {' | '.join(SPREADS)} |", "|---" * (3 + len(SPREADS)) + "|"]
    for (provider, device), methods in COMPATIBILITY.items():
        for cells, alike in groupby(methods, key=lambda method: methods[method]):
            shown = " | ".join(cell if cell in (TESTED, UNTESTED) else refused for cell in cells)
            lines.append(f"| {provider} | {device} | {', '.join(alike)} | {shown} |")
    return "\n".join(lines)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
