"""Parallelism of a run: DDP, or DeepSpeed's ZeRO with a checked configuration."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from configs.schema import FinetuneConfig, deepspeed_preset_path
from training.models.kernels import Device, KernelChoice, WeightsDtype, choose_kernels
from training.models.libraries import BITSANDBYTES_OPTIMIZERS
from utils.errors import AnnealError

ZeroStage = Literal[0, 1, 2, 3]
"""0 without DeepSpeed."""

# Accelerate replaces the optimizer with DeepSpeed's CPU optimizer, and unknown ones with plain Adam.
_OFFLOADABLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit")
# bitsandbytes passes the number of entries to CUDA as a 32-bit integer (`ct.c_int32(g.numel())` in bitsandbytes/backends/cuda/ops.py).
_MAX_ENTRIES = 2**31 - 1


# Their states have one value per weight, so they can be split differently. 8-bit optimizers quantize blocks of a device's flat
# tensor, and Adafactor clips by the root mean square of a device's part.
_SPLITTABLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit", "sgd")


# Without `gradient_clipping`, DeepSpeed 0.19.8 clips at 1.0, whatever max_grad_norm says.
_KEYS_OF_YAML = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)


class StrategyError(AnnealError):
    """A DeepSpeed configuration that cannot be used; the message names the file, the cause and the fix."""


@dataclass(frozen=True)
class Execution:
    """The DeepSpeed settings and the kernels of a run."""

    deepspeed: dict[str, Any] | None
    """DeepSpeed's own configuration; None without DeepSpeed."""
    zero_stage: ZeroStage
    kernels: KernelChoice
    weights_dtype: WeightsDtype
    """The dtype in which the base model is loaded."""


def resolve_execution(
    config: FinetuneConfig,
    device: Device,
    *,
    continued: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
    exceeded_rope: int | None = None,
) -> Execution:
    """Read the DeepSpeed configuration and choose the kernels.

    Args:
        config: The YAML.
        device: The device to train on.
        continued: The configuration of the adapter to continue, once it has been read.
        elsewhere: Whether the run trains in another environment, whose packages are unknown here.
        exceeded_rope: See `exceeded_rope_of_unsloth` in training/models/attention.py, once the model has been read.
    """
    settings = deepspeed_settings(config)
    stage = cast("ZeroStage", settings.get("zero_optimization", {}).get("stage", 0) if settings else 0)
    # Full-parameter training without DeepSpeed uses fp32 master weights and autocast.
    in_16_bits = config.dtype == "bf16" and (config.trains_adapter or stage > 0)
    kernels = choose_kernels(
        config, device, stage, continued=continued, elsewhere=elsewhere, exceeded_rope=exceeded_rope
    )
    return Execution(settings, stage, kernels, "bf16" if in_16_bits else "fp32")


def deepspeed_settings(config: FinetuneConfig) -> dict[str, Any] | None:
    """Return the checked DeepSpeed configuration of the run, or None without DeepSpeed."""
    if config.deepspeed is None:
        return None
    path = (
        deepspeed_preset_path(config.deepspeed)
        if isinstance(config.deepspeed, str)
        else Path(config.deepspeed.config_path)
    )
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StrategyError(
            f"deepspeed: {path} does not exist. Name a preset (zero_1, zero_2, zero_3, …) or an existing file."
        ) from error
    except (OSError, ValueError) as error:
        raise StrategyError(
            f"deepspeed: {path} cannot be read as JSON ({error}). Fix the file, or name a preset (zero_1, zero_2, zero_3, …)."
        ) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise StrategyError(
            f"deepspeed: {path} is not a DeepSpeed configuration: the file and its `zero_optimization` must be JSON objects. Fix it, or "
            "name a preset (zero_1, zero_2, zero_3, …)."
        )
    _take_values_from_yaml(settings)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise StrategyError(f"deepspeed: {path} has `zero_optimization.stage` {stage!r}. Write 0, 1, 2 or 3.")
    for block, key in (
        ("optimizer", "optim, learning_rate and weight_decay"),
        ("scheduler", "lr_scheduler_type and num_warmup_steps"),
    ):
        if block in settings:
            raise StrategyError(
                f"deepspeed: {path} has a block `{block}`. Remove it, and set {key} in the YAML instead."
            )
    _check_offloading(config, path, settings.get("zero_optimization", {}))
    return settings


def _take_values_from_yaml(settings: dict[str, Any]) -> None:
    """Add the keys whose values the YAML determines: transformers fills in "auto", but leaves a missing key to DeepSpeed's default."""
    for key in _KEYS_OF_YAML:
        settings.setdefault(key, "auto")
    settings.setdefault("bf16", {"enabled": "auto"})


def is_offloaded(zero: Mapping[str, Any], block: Literal["offload_optimizer", "offload_param"]) -> bool:
    """Return whether DeepSpeed's `zero_optimization` offloads these states to CPU memory or to a disk."""
    return zero.get(block, {}).get("device", "none") != "none"


def offloads(settings: Mapping[str, Any] | None) -> list[str]:
    """Return what a DeepSpeed configuration offloads, and where to, as `optimizer: cpu`."""
    zero = (settings or {}).get("zero_optimization", {})
    return [
        f"{block.removeprefix('offload_')}: {zero[block]['device']}"
        for block in ("offload_optimizer", "offload_param")
        if is_offloaded(zero, block)
    ]


def check_resharding(config: FinetuneConfig, execution: Execution) -> None:
    """Check that checkpoints of a run can be converted to another number of devices.

    Raises:
        StrategyError: The optimizer or the DeepSpeed configuration ties them to the number of devices that saved them.
    """
    for reason, fix in _ties_to_devices(config, execution.deepspeed or {}, execution.zero_stage):
        raise StrategyError(
            f"num_devices: {reason}, so its checkpoints cannot be converted to another number of devices. {fix}, or resume with the number "
            "of devices that saved the checkpoint, without a range."
        )


def _ties_to_devices(
    config: FinetuneConfig, settings: Mapping[str, Any], stage: int
) -> Iterator[tuple[str, str]]:
    """Yield what ties the checkpoints of a DeepSpeed run to a number of devices, and the fix."""
    if not settings:
        return
    if stage == 0:
        yield (
            "the DeepSpeed configuration has no ZeRO stage",
            "Remove `deepspeed` to train with DDP, or write deepspeed: zero_1",
        )
    if config.optim not in _SPLITTABLE_OPTIMIZERS:
        yield (
            f"under ZeRO, the states of `optim: {config.optim}` depend on the number of devices",
            "Write optim: adamw_torch in a new run",
        )
    if any(place.endswith("nvme") for place in offloads(settings)):
        yield (
            "DeepSpeed stores what it offloads to nvme in files per device",
            "Offload to cpu in a new run",
        )
    if settings.get("zero_optimization", {}).get("round_robin_gradients"):
        yield (
            "with `round_robin_gradients`, DeepSpeed does not record the order of its flat tensors",
            "Remove it in a new run",
        )
    if stage == 1 and settings.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        yield (
            "with ZeRO-1 and `grad_accum_dtype: fp32`, DeepSpeed divides its flat tensors in another way",
            "Write deepspeed: zero_2 in a new run",
        )
    accumulated = settings.get("gradient_accumulation_steps", "auto")
    if accumulated != "auto" and config.fewest_devices < config.most_devices:
        yield (
            f"the DeepSpeed file sets `gradient_accumulation_steps: {accumulated}` for one number of devices",
            'Write "auto" there',
        )


def _check_offloading(config: FinetuneConfig, path: Path, zero: Mapping[str, Any]) -> None:
    """Check that a configuration offloads only on GPUs, and only an optimizer that DeepSpeed has for CPU memory."""
    offloads_optimizer = is_offloaded(zero, "offload_optimizer")
    if config.device == "cpu" and (offloads_optimizer or is_offloaded(zero, "offload_param")):
        raise StrategyError(
            f"deepspeed: {path.name} offloads to CPU memory, which has no effect with `device: cpu`. Write `deepspeed: zero_3`, or a file "
            "without `offload_optimizer` and `offload_param`."
        )
    if offloads_optimizer and config.optim not in _OFFLOADABLE_OPTIMIZERS:
        raise StrategyError(
            f"deepspeed: {path.name} offloads the optimizer, but `optim: {config.optim}` cannot be offloaded to CPU memory. Write `optim: "
            "adamw_torch`, or a file without `offload_optimizer`."
        )


def check_optimizer(config: FinetuneConfig, stage: int, trained: int) -> None:
    """Check that a bitsandbytes optimizer can index its tensors: ZeRO-1 and ZeRO-2 flatten a device's weights into one.

    With more than 2^31 - 1 entries in a tensor, bitsandbytes silently skips most of them.

    Args:
        config: The YAML.
        stage: The ZeRO stage.
        trained: Number of trainable parameters over all devices.
    """
    least_devices = -(-trained // _MAX_ENTRIES)
    if (
        stage in (1, 2)
        and config.optim.startswith(BITSANDBYTES_OPTIMIZERS)
        and config.fewest_devices < least_devices
    ):
        raise StrategyError(
            f"optim: {config.optim}: under ZeRO-{stage} each of {config.fewest_devices} devices has {trained / config.fewest_devices:,.0f} "
            f"trainable parameters in one tensor; bitsandbytes supports at most {_MAX_ENTRIES:,}. Write optim: adamw_torch, "
            f"deepspeed: zero_3, or num_devices: {least_devices} or more."
        )
