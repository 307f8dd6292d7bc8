"""The request from which every kernel provider builds a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import LoraConfig
from training.models.attention import Attention
from training.models.kernels import Device, WeightsDtype
from training.models.new_tokens import NewTokens

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
    weights_dtype: WeightsDtype
    """The dtype that the base model is loaded in."""
    zero_stage: int
    load_in_4bit: bool
    attention: Attention
    gradient_checkpointing: bool | Literal["unsloth"]
    context_length: int
    """Maximum sequence length in tokens, including padding."""
    seed: int
    """Seed for a new adapter's weights."""
    trust_remote_code: bool
    deterministic: bool
    """True to use deterministic operations only."""
    new_tokens: NewTokens | None = None
    """Tokens that the run adds to the vocabulary."""

    @property
    def is_lora(self) -> bool:
        """Return whether an adapter is trained and the base model is frozen."""
        return self.lora is not None or self.adapter_directory is not None
