"""Which kernels a run takes: one table of what goes together, from which `auto` chooses and the README is checked."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from configs.schema import FinetuneConfig
from training.models.files import ModelError

Device = Literal["cuda", "cpu"]
Provider = Literal["unsloth", "liger", "torch"]


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
    if asked == "torch":
        return KernelChoice("torch", "asked for")
    if asked == "unsloth":
        if reason := _why_not_unsloth(config, stage):
            raise ModelError(f"kernels: unsloth: {reason}. Write kernels: auto, liger or torch.")
        if not _installed("unsloth"):
            raise ModelError(
                "kernels: unsloth: Unsloth is not installed. `make setup-unsloth` installs it (its licence: see README)."
            )
        return KernelChoice("unsloth", "asked for" + (", in its CPU mode" if device == "cpu" else ""))
    if asked == "liger":
        if device == "cpu":
            raise ModelError(
                "kernels: liger: its Triton kernels need a GPU, and the run is on CPU. Write kernels: auto or torch."
            )
        return KernelChoice("liger", "asked for")
    if device == "cpu":
        return KernelChoice("torch", "auto: on CPU there is nothing for Triton kernels to speed up")
    if not _why_not_unsloth(config, stage) and _installed("unsloth"):
        return KernelChoice("unsloth", "auto: the fastest on one GPU a worker")
    why = _why_not_unsloth(config, stage) or "Unsloth is not installed (make setup-unsloth)"
    if _installed("triton"):
        return KernelChoice("liger", f"auto: {why}")
    return KernelChoice("torch", f"auto: {why}, and Triton is missing for Liger's")


def _why_not_unsloth(config: FinetuneConfig, stage: int) -> str | None:
    if stage == 3:
        return "Unsloth does not split weights (ZeRO-3)"
    if config.packing:
        return "Unsloth's attention lets packed rows see one another"
    if config.task == "preference_tuning":
        return "preference tuning compares log-probabilities, and Unsloth's forward pass gives a loss"
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
