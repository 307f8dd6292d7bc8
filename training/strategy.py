"""How a run is spread over devices: plain data parallelism, or DeepSpeed's ZeRO."""

import json
from pathlib import Path
from typing import Any

from configs.schema import FinetuneConfig, deepspeed_preset_path


class StrategyError(Exception):
    """A DeepSpeed configuration that cannot be used; the message says which file, what and what to do."""


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


def zero_stage(settings: dict[str, Any] | None) -> int:
    """The ZeRO stage; 0 is plain data parallelism."""
    return int(settings.get("zero_optimization", {}).get("stage", 0)) if settings else 0
