"""The request that every kernel provider builds a model from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import LoraConfig
from training.models.kernels import Device, WeightsDtype

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
    """The dtype that the base model is loaded in."""
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
