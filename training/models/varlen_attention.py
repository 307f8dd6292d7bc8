"""Attention of packed rows on a GPU by torch's own flash kernels: they are told where each row ends, so that no mask of all pairs is
built, and tokens of other rows cost nothing.

transformers offers it by a package of its own (flash-attn), which needs a compiler; these kernels come with torch.
"""

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from training.models.architecture import PACKED_WITHOUT_MASK

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "torch_varlen"
"""As transformers calls it, in `attn_implementation`."""

_MOST_HEAD_DIM, _HEAD_DIM_STEP = 256, 8  # of torch's flash kernels
_LEAST_COMPUTE_CAPABILITY = (8, 0)  # Ampere
# Since torch 2.12 they have to be told of fewer heads of keys than of queries.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def serves(config: "PreTrainedConfig", dtype: torch.dtype) -> bool:
    """Whether these kernels compute this model's attention, on this worker's GPU.

    Args:
        config: The model's.
        dtype: In which attention is computed.
    """
    if config.model_type not in PACKED_WITHOUT_MASK:
        return False
    known: Any = config
    head_dim = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    return (
        torch.cuda.get_device_capability() >= _LEAST_COMPUTE_CAPABILITY
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= _MOST_HEAD_DIM
        and head_dim % _HEAD_DIM_STEP == 0
        and not getattr(known, "attention_dropout", 0)
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
    """Causal attention inside each row, by transformers' interface.

    Args:
        module: The layer's.
        query: (1, heads, tokens, head_dim), all rows in one line.
        key: (1, key-value heads, tokens, head_dim).
        value: As key.
        attention_mask: None.
        cu_seq_lens_q: Where each row begins, and where the last ends, in tokens: int32, (rows + 1).
        max_length_q: Tokens of the longest row.
        dropout: None.
        scaling: Of the scores; None: 1 / sqrt(head_dim).
        sliding_window: How many tokens each sees, itself among them; None: all before it.

    Returns:
        (1, tokens, heads, head_dim), and no scores.
    """
    assert attention_mask is None
    assert not dropout
    assert query.shape[0] == 1
    # Autocast casts nothing for this kernel, and norms in fp32 make queries of fp32.
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
