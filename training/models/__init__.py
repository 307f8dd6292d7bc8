"""A plan's model, ready to train: one module per kernel provider, one interface, imported only when chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.schema import LoraConfig
from training.models.kernels import Device, Provider, WeightsDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["REFERENCE_ADAPTER", "ModelRequest", "add_reference", "build_model"]

REFERENCE_ADAPTER = "reference"
"""PEFT's name for a continued adapter as it was, where the trained one is compared with it."""


@dataclass(frozen=True)
class ModelRequest:
    """What is to be built, on this worker."""

    directory: Path
    """The base model's files."""
    adapter_directory: Path | None
    """A LoRA adapter to continue; trainable with the shape it has."""
    lora: LoraConfig | None
    """A new LoRA adapter; None without adapter_directory is full-parameter training."""
    device: Device
    dtype: Literal["bf16", "fp32"]
    weights_dtype: WeightsDtype
    """In which the base is loaded."""
    zero_stage: int
    load_in_4bit: bool
    flash_attention_2: bool
    packing: bool
    """Sequences hold several rows."""
    gradient_checkpointing: bool | Literal["unsloth"]
    context_length: int
    """Tokens of the longest sequence of a batch, with its padding."""
    seed: int
    """Decides a new adapter's weights."""
    trust_remote_code: bool
    deterministic: bool
    """Only operations that give the same bits every time."""

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained and the base stays as it is."""
        return self.lora is not None or self.adapter_directory is not None


def build_model(provider: Provider, request: ModelRequest) -> "PreTrainedModel":
    """Load the base, put the adapter on it, and apply the provider's kernels."""
    if provider == "unsloth":
        from training.models import unsloth_provider

        return unsloth_provider.build(request)
    if provider == "liger":
        from training.models import liger_provider

        return liger_provider.build(request)
    from training.models import torch_provider

    return torch_provider.build(request)


def add_reference(model: "PreTrainedModel", request: ModelRequest) -> "PreTrainedModel | None":
    """What preference tuning compares a built model with: the model as it is now.

    Returns:
        A second model in full-parameter training. None for adapters: a new one is turned off, a continued one gets a frozen copy of
        itself, called REFERENCE_ADAPTER.
    """
    from training.models import torch_provider

    if not request.is_lora:
        return torch_provider.load_base(request)
    if request.adapter_directory is not None:
        torch_provider.add_frozen_copy(model, request)
    return None
