"""Choice of attention: implementation, and whether batches get an attention mask."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import FinetuneConfig
from training.models.architecture import causal_model_class, load_config
from training.models.kernels import Device, Provider, is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Implementation = Literal["sdpa", "eager", "flash_attention_2", "torch_varlen", "unsloth"]
"""An `attn_implementation` of transformers; torch_varlen is training/models/varlen_attention.py, and unsloth means Unsloth's own."""

PACKED_WITHOUT_MASK = frozenset(
    {
        "cohere2",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
"""Tested `model_type`s that pass row boundaries to attention. Packed rows of other models are separated by a mask."""

_MOST_HEAD_DIM, _HEAD_DIM_STEP = 256, 8  # limits of PyTorch's flash kernels


@dataclass(frozen=True)
class AttentionTraits:
    """The properties of a model that restrict its attention."""

    has_softcapping: bool
    """True if attention uses logit softcapping, which PyTorch's SDPA ignores."""
    needs_mask: bool
    """True if the loss of padded rows depends on the attention mask."""
    fits_varlen: bool
    """True if PyTorch's flash kernels for packed rows support the model."""


@dataclass(frozen=True)
class Attention:
    """The attention of a run."""

    implementation: Implementation
    mask: bool
    """True if batches get an attention mask. Packed rows never do: position ids separate them."""

    @property
    def takes_row_boundaries(self) -> bool:
        """Return whether packed rows are separated by their boundaries, in batches without padding."""
        return self.implementation in ("flash_attention_2", "torch_varlen")


def read_traits(directory: Path, source: str, *, trust_remote_code: bool) -> AttentionTraits:
    """Read the traits from a model's config.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    config = load_config(directory, source, trust_remote_code)
    return AttentionTraits(
        has_softcapping=_has_softcapping(config),
        needs_mask=_needs_mask(config, trust_remote_code),
        fits_varlen=_fits_varlen(config),
    )


def choose_attention(
    config: FinetuneConfig, traits: AttentionTraits, device: Device, kernels: Provider
) -> Attention:
    """Choose the attention of a run."""
    # Unsloth drops the mask itself and treats position ids as a sign of packed rows.
    mask = not config.packing and (kernels == "unsloth" or traits.needs_mask)
    return Attention(_implementation(config, traits, device, kernels), mask)


def plain_attention(config: "PreTrainedConfig") -> Literal["sdpa", "eager"]:
    """Return the implementation for any device and any batch; models with logit softcapping (Gemma 2) get eager attention."""
    return "eager" if _has_softcapping(config) else "sdpa"


def _implementation(
    config: FinetuneConfig, traits: AttentionTraits, device: Device, kernels: Provider
) -> Implementation:
    if device == "cuda":
        if kernels == "unsloth":
            return "unsloth"
        if config.flash_attention_2 and is_installed("flash_attn"):
            return "flash_attention_2"
        if config.packing and config.dtype == "bf16" and traits.fits_varlen:
            return "torch_varlen"
    return "eager" if traits.has_softcapping else "sdpa"


def _has_softcapping(config: "PreTrainedConfig") -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _needs_mask(config: "PreTrainedConfig", trust_remote_code: bool) -> bool:
    """Return whether a model needs an attention mask for right padding, which causal attention ignores anyway.

    A mask is needed for:
        - custom code, whose use of the mask is unknown;
        - mixtures of experts, whose load-balancing loss counts tokens by the mask;
        - models without position ids, which replace the mask;
        - encoders used as decoders, which count positions differently.
    """
    model_class = causal_model_class(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    return (
        model_class is None
        or hasattr(text, "output_router_logits")
        or "position_ids" not in signature(model_class.forward).parameters
        or getattr(text, "is_decoder", False)
    )


def _fits_varlen(config: "PreTrainedConfig") -> bool:
    if config.model_type not in PACKED_WITHOUT_MASK:
        return False
    known: Any = config
    head_dim = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    return (
        head_dim <= _MOST_HEAD_DIM
        and head_dim % _HEAD_DIM_STEP == 0
        and not getattr(known, "attention_dropout", 0)
    )
