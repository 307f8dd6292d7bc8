"""The request from which every kernel provider builds a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import LoraConfig
from training.models.kernels import Device

REFERENCE_ADAPTER = "reference"
"""PEFT name of the frozen initial copy of a continued adapter, the reference in preference tuning."""


@dataclass(frozen=True)
class ModelRequest:
    """The settings of the model to build on this worker."""

    directory: Path
    """Local directory of the base model."""
    adapter_directory: Path | None
    """Local directory of a LoRA adapter to continue, with its own settings."""
    lora: LoraConfig | None
    """Settings of a new LoRA adapter. If this and adapter_directory are None, training is full-parameter."""
    device: Device
    dtype: Literal["bf16", "fp32"]
    zero_stage: int
    load_in_4bit: bool
    flash_attention_2: bool
    packing: bool
    """True if sequences contain several rows."""
    gradient_checkpointing: bool | Literal["unsloth"]
    context_length: int
    """Maximum sequence length in tokens, including padding."""
    seed: int
    """Seed for a new adapter's weights."""
    trust_remote_code: bool
    deterministic: bool
    """True to use deterministic operations only."""

    @property
    def is_lora(self) -> bool:
        """Return whether an adapter is trained and the base model is frozen."""
        return self.lora is not None or self.adapter_directory is not None

    @property
    def weights_dtype(self) -> Literal["bf16", "fp32"]:
        """Return the dtype of the base; full-parameter training without DeepSpeed uses fp32 weights and autocast."""
        return "bf16" if self.dtype == "bf16" and (self.is_lora or self.zero_stage > 0) else "fp32"
