"""How a run is spread over devices: plain data parallelism, or DeepSpeed's ZeRO."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from configs.schema import FinetuneConfig, deepspeed_preset_path
from training.models.kernels import Device, KernelChoice, WeightsDtype, choose_kernels
from utils.errors import AnnealError

ZeroStage = Literal[0, 1, 2, 3]
"""0 is plain data parallelism."""

_OF_BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_", "lion_")
# It hands the number of entries to CUDA as a 32-bit integer (`ct.c_int32(g.numel())` in bitsandbytes/backends/cuda/ops.py).
_MOST_ENTRIES_OF_BITSANDBYTES = 2**31 - 1


class StrategyError(AnnealError):
    """A DeepSpeed configuration that cannot be used; the message says which file, what and what to do."""


@dataclass(frozen=True)
class Execution:
    """How a run is spread over devices, and by which kernels it computes."""

    deepspeed: dict[str, Any] | None
    """DeepSpeed's own configuration; None for plain data parallelism."""
    zero_stage: ZeroStage
    kernels: KernelChoice
    weights_dtype: WeightsDtype
    """In which the base is loaded."""


def resolve_execution(config: FinetuneConfig, device: Device) -> Execution:
    """Read the DeepSpeed configuration and choose the kernels.

    Raises:
        StrategyError: the DeepSpeed file cannot be used.
        ModelError: the kernels cannot serve the run, or are not installed.
    """
    settings = deepspeed_settings(config)
    stage = cast("ZeroStage", settings.get("zero_optimization", {}).get("stage", 0) if settings else 0)
    # Full-parameter training without DeepSpeed keeps fp32 masters and autocasts.
    in_16_bits = config.dtype == "bf16" and (config.trains_adapter or stage > 0)
    return Execution(settings, stage, choose_kernels(config, device, stage), "bf16" if in_16_bits else "fp32")


def deepspeed_settings(config: FinetuneConfig) -> dict[str, Any] | None:
    """DeepSpeed's own configuration for the run, or None for plain data parallelism.

    Raises:
        StrategyError: the file is missing, no DeepSpeed configuration, or says what the YAML says.
    """
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
            f"deepspeed: {path} cannot be read as JSON ({error}). Mend it, or name a preset (zero_1, zero_2, zero_3, …)."
        ) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise StrategyError(
            f"deepspeed: {path} is no DeepSpeed configuration: it and its `zero_optimization` are JSON objects. Mend it, or name a "
            "preset (zero_1, zero_2, zero_3, …)."
        )
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise StrategyError(f"deepspeed: {path} has `zero_optimization.stage` {stage!r}. Write 0, 1, 2 or 3.")
    for block, key in (
        ("optimizer", "optim, learning_rate and weight_decay"),
        ("scheduler", "lr_scheduler_type and num_warmup_steps"),
    ):
        if block in settings:
            raise StrategyError(
                f"deepspeed: {path} has a block `{block}`. Take it out, and say it in the YAML: {key}."
            )
    return settings


def check_optimizer(config: FinetuneConfig, stage: int, trained: int) -> None:
    """Make sure that the optimizer can count what a GPU holds in one piece: ZeRO-1 and ZeRO-2 lay all weights of a device into one.

    Args:
        config: The YAML.
        stage: Of ZeRO.
        trained: Numbers that are trained, on all devices together.

    Raises:
        StrategyError: it would leave most of them as they are, and say nothing.
    """
    least_devices = -(-trained // _MOST_ENTRIES_OF_BITSANDBYTES)
    if (
        stage in (1, 2)
        and config.optim.startswith(_OF_BITSANDBYTES)
        and config.fewest_devices < least_devices
    ):
        raise StrategyError(
            f"optim: {config.optim}: under ZeRO-{stage} each of {config.fewest_devices} devices holds {trained / config.fewest_devices:,.0f} "
            f"trained numbers in one piece, and bitsandbytes counts to {_MOST_ENTRIES_OF_BITSANDBYTES:,}. Write optim: adamw_torch, "
            f"deepspeed: zero_3, or num_devices: {least_devices} or more."
        )
