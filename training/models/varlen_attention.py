"""Variable-length attention for packed rows with PyTorch's flash kernels.

The kernels take the row boundaries, so no full attention mask is built and attention across rows is never computed. transformers
offers this through flash-attn, which must be compiled; these kernels ship with PyTorch.
"""

from inspect import signature
from typing import Any, Literal

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from training.models.files import ModelError

NAME: Literal["torch_varlen"] = "torch_varlen"
"""Name in the `attn_implementation` of transformers."""

_LEAST_COMPUTE_CAPABILITY = (8, 0)  # Ampere
# PyTorch 2.12 and later need a flag for grouped-query attention.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def check_gpu() -> None:
    """Check that these kernels run on this worker's GPU."""
    if torch.cuda.get_device_capability() < _LEAST_COMPUTE_CAPABILITY:
        raise ModelError(
            f"packing: PyTorch's flash kernels need an NVIDIA GPU of the Ampere generation or later, not {torch.cuda.get_device_name()}. Set "
            "packing: false, or dtype: fp32."
        )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each row, as a transformers attention function.

    Args:
        module: The attention layer; unused.
        query: (1, heads, tokens, head_dim), all rows concatenated.
        key: (1, key-value heads, tokens, head_dim).
        value: Same shape as key.
        attention_mask: Must be None.
        cu_seq_lens_q: Cumulative row lengths in tokens: int32, (rows + 1).
        max_length_q: Tokens of the longest row.
        dropout: Must be 0.
        scaling: Scale of the scores; None: 1 / sqrt(head_dim).
        sliding_window: Window in tokens, including the current token; None: full causal attention.

    Returns:
        The output, (1, tokens, heads, head_dim), and None for the attention weights.
    """
    assert attention_mask is None
    assert not dropout
    assert query.shape[0] == 1
    # Autocast does not cover this kernel, and fp32 norms produce fp32 queries.
    device = query.device.type
    casts = query.dtype == torch.float32 and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else query.dtype
    queries, keys, values = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    result = varlen_attn(
        queries,
        keys,
        values,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **_GROUPED,
    )
    assert isinstance(result, torch.Tensor)
    return result.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
