"""Choice of attention: implementation, and whether batches get an attention mask."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import FinetuneConfig
from configs.sequence_parallel import KEY, Excluded, error_with
from training.models.architecture import ModelShape, causal_model_class, load_config
from training.models.files import ModelError
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

SEQUENCE_PARALLEL = PACKED_WITHOUT_MASK - {"mixtral", "qwen3_moe"}
"""Tested `model_type`s whose sequences workers can share. The load-balancing loss of a mixture would count a worker's tokens alone."""

_MOST_HEAD_DIM, _HEAD_DIM_STEP = 256, 8  # limits of PyTorch's flash kernels
# Their frequencies depend on the largest position of the batch, which differs between workers that share a sequence.
_ROPE_BY_LENGTH = {"dynamic", "longrope"}
# Types with RoPE of Unsloth's own on a GPU, if an adapter is trained (unsloth/models/loader.py in Unsloth 2026.10.9).
_ROPE_BY_UNSLOTH = {"gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3"}


@dataclass(frozen=True)
class AttentionTraits:
    """The properties of a model that restrict its attention."""

    has_softcapping: bool
    """True if attention uses logit softcapping, which PyTorch's SDPA ignores."""
    needs_mask: bool
    """True if the loss of padded rows depends on the attention mask."""
    fits_varlen: bool
    """True if PyTorch's flash kernels for packed rows support the model."""
    has_sdpa: bool = True
    """False if transformers has no SDPA for the model; the flash-attn package does not support those models either."""
    undivided: Excluded | None = "other architectures"
    """Why workers cannot share sequences; None if they can: tokens meet in attention only, and each has its position id."""
    rope_limit: int | None = None
    """See `rope_limit`."""
    rope_limit_of_unsloth: int | None = None
    """See `_rope_limit_of_unsloth`."""


@dataclass(frozen=True)
class Attention:
    """The attention of a run."""

    implementation: Implementation
    mask: bool
    """True if batches get an attention mask. Packed rows never do: position ids separate them."""
    sequence_parallel_size: int = 1
    """Number of workers that share each sequence; see training/models/sequence_parallel.py."""

    @property
    def takes_row_boundaries(self) -> bool:
        """Return whether packed rows are separated by their boundaries, in batches without padding."""
        return self.implementation in ("flash_attention_2", "torch_varlen") or self.sequence_parallel_size > 1


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
        has_sdpa=_has_sdpa(config, trust_remote_code),
        undivided=_undivided(config, trust_remote_code),
        rope_limit=rope_limit(config),
        rope_limit_of_unsloth=_rope_limit_of_unsloth(config),
    )


def choose_attention(
    config: FinetuneConfig, traits: AttentionTraits, device: Device, kernels: Provider
) -> Attention:
    """Choose the attention of a run."""
    # Unsloth drops the mask itself and treats position ids as a sign of packed rows.
    mask = not config.packing and (kernels == "unsloth" or traits.needs_mask)
    return Attention(_implementation(config, traits, device, kernels), mask, config.sequence_parallel_size)


def check_sequence_parallel(
    config: FinetuneConfig, traits: AttentionTraits, shape: ModelShape | None, source: str
) -> None:
    """Check that as many workers as `sequence_parallel_size` can share the sequences of a model, and its heads.

    Args:
        config: The YAML.
        traits: The model's properties.
        shape: The model's dimensions, or None if they are unknown.
        source: Name of the model in messages.
    """
    size = config.sequence_parallel_size
    if size == 1:
        return
    if shape is None or traits.undivided:
        raise ModelError(
            f"model {source}: {error_with(traits.undivided or 'other architectures')}. Supported architectures: "
            f"{', '.join(sorted(SEQUENCE_PARALLEL))}."
        )
    if not _shares_heads(shape, size):
        usable = [str(number) for number in range(1, shape.heads + 1) if _shares_heads(shape, number)]
        raise ModelError(
            f"model {source}: `{KEY}`: {size} workers cannot share {shape.heads} heads and {shape.key_value_heads} key-value heads equally. "
            f"Write {' or '.join(usable)}, a number that also divides num_devices."
        )


def _shares_heads(shape: ModelShape, workers: int) -> bool:
    """Return whether each worker gets as many heads, with key-value heads that several workers need copied to each of them."""
    key_value = shape.key_value_heads
    return shape.heads % workers == 0 and (key_value % workers == 0 or workers % key_value == 0)


def check_windows(attention: Attention, shape: ModelShape, longest: int, source: str) -> None:
    """Check that workers that share sequences without a mask need none for a sliding window.

    Args:
        attention: The attention of the run.
        shape: The model's dimensions.
        longest: Tokens of the longest row.
        source: Name of the model in messages.
    """
    windows = [window for window in shape.windows if window is not None and window < longest]
    if attention.sequence_parallel_size > 1 and attention.implementation == "sdpa" and windows:
        raise ModelError(
            f"model {source}: has a sliding window of {min(windows):,} tokens, but rows have up to {longest:,}. "
            f"{error_with('a sliding window shorter than the rows')}."
        )


def plain_attention(
    config: "PreTrainedConfig", *, trust_remote_code: bool = False
) -> Literal["sdpa", "eager"]:
    """Return the implementation for any device and any batch.

    Models with logit softcapping (Gemma 2) and those without SDPA in transformers (GPT-OSS) get eager attention.
    """
    return "sdpa" if _has_sdpa(config, trust_remote_code) and not _has_softcapping(config) else "eager"


def _implementation(
    config: FinetuneConfig, traits: AttentionTraits, device: Device, kernels: Provider
) -> Implementation:
    if device == "cuda":
        if kernels == "unsloth":
            return "unsloth"
        if config.flash_attention_2 and traits.has_sdpa and is_installed("flash_attn"):
            return "flash_attention_2"
        if config.packing and config.dtype == "bf16" and traits.fits_varlen:
            return "torch_varlen"
    return "sdpa" if traits.has_sdpa and not traits.has_softcapping else "eager"


def _has_softcapping(config: "PreTrainedConfig") -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _has_sdpa(config: "PreTrainedConfig", trust_remote_code: bool) -> bool:
    """Return whether transformers has SDPA for the model; custom code is loaded with SDPA and rejects it itself."""
    model_class = causal_model_class(config, trust_remote_code=trust_remote_code)
    return model_class is None or model_class._supports_sdpa


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


def rope_limit(config: "PreTrainedConfig") -> int | None:
    """Return the longest sequence with RoPE's ordinary frequencies; None if they do not depend on the length.

    A longer sequence changes the frequencies of all rows in its batch (`dynamic_rope_update` in transformers 5.17).
    """
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    limits = [
        # dynamic ignores original_max_position_embeddings, even if the config has it
        (kind == "longrope" and rope.get("original_max_position_embeddings")) or text.max_position_embeddings
        for rope in (ropes, *ropes.values())
        if isinstance(rope, dict) and (kind := rope.get("rope_type")) in _ROPE_BY_LENGTH
    ]
    return min(limits, default=None)


def _rope_limit_of_unsloth(config: "PreTrainedConfig") -> int | None:
    """Return the longest sequence for which a model can be loaded without a change of its RoPE by Unsloth; None: any length.

    For sequences above `max_position_embeddings`, Unsloth divides the positions of all sequences (`_extended_rope_scaling` in
    unsloth/models/llama.py), and nothing records this with an adapter. It computes dynamic RoPE and longrope with their ordinary
    frequencies at any length, and Gemma's without the scaling of its config.
    """
    known: Any = config
    if config.model_type not in _ROPE_BY_UNSLOTH:
        return None
    kind = (known.rope_parameters or {}).get("rope_type", "default")
    if kind == "llama3":
        return None
    if kind != "default" and config.model_type in ("gemma", "gemma2"):
        return 0
    return min(rope_limit(config) or known.max_position_embeddings, known.max_position_embeddings)


def exceeded_rope_of_unsloth(
    config: FinetuneConfig, traits: AttentionTraits, max_context: int | None
) -> int | None:
    """Return the length above which Unsloth would change the RoPE of a run, or None if the run has no longer sequences.

    Args:
        config: The YAML.
        traits: The model's properties.
        max_context: Longest sequence without a context_length.
    """
    limit, longest = traits.rope_limit_of_unsloth, config.context_length or max_context or 0
    return limit if limit is not None and longest > limit else None


def _undivided(config: "PreTrainedConfig", trust_remote_code: bool) -> Excluded | None:
    if _has_softcapping(config):
        return "logit softcapping"
    if rope_limit(config) is not None:
        return "RoPE that depends on the length"
    is_custom = causal_model_class(config, trust_remote_code=trust_remote_code) is None
    if is_custom or hasattr(config.get_text_config(), "output_router_logits"):
        return "mixtures of experts and custom code"
    is_tested = config.model_type in SEQUENCE_PARALLEL and not _needs_mask(config, trust_remote_code)
    return None if is_tested else "other architectures"


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
