"""Sequence parallelism: attention of sequences whose tokens are divided among a group of workers (DeepSpeed-Ulysses).

Only attention mixes tokens. Before it, an all-to-all exchanges tokens for heads, so that each worker computes complete sequences
for its part of the heads; afterwards, another one exchanges them back. Jacobs et al. 2023, arXiv 2309.14509, section 3.

transformers 5.17 offers DeepSpeed's implementation, which is not used: it needs DeepSpeed, attends across packed rows with SDPA,
averages the loss over micro-batches instead of tokens, and evaluates complete sequences on each worker.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from training.models import varlen_attention

NAME: Literal["sequence_parallel"] = "sequence_parallel"
"""Name in the `attn_implementation` of transformers, which builds no mask for an implementation that it does not know."""

_HEADS, _TOKENS = 1, 2  # dimensions


def join_group(size: int, implementation: str) -> None:
    """Form groups of this many workers with consecutive ranks, and register their attention as NAME. Every rank must call this.

    Args:
        size: Workers per group.
        implementation: Attention that each worker computes: sdpa or torch_varlen.
    """
    group, _ = dist.new_subgroups(size)
    within = {"sdpa": causal_attention, varlen_attention.NAME: varlen_attention.attention}[implementation]
    AttentionInterface.register(NAME, partial(attention, group=group, within=within))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    group: Any,
    within: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention over the tokens of all workers of the group, as a transformers attention function.

    Args:
        module: The attention layer.
        query: (batch, heads, this worker's tokens, head_dim).
        key: (batch, key-value heads, this worker's tokens, head_dim).
        value: Same shape as key.
        attention_mask: Must be None.
        group: The process group; ranks hold consecutive parts of the sequences.
        within: The attention function for complete sequences of some heads.
        arguments: Passed to `within`.

    Returns:
        The output, (batch, this worker's tokens, heads, head_dim), and None for the attention weights.
    """
    assert attention_mask is None
    size = dist.get_world_size(group)
    if size > key.shape[_HEADS]:  # each key-value head goes to several workers
        copies = size // key.shape[_HEADS]
        key, value = (states.repeat_interleave(copies, _HEADS) for states in (key, value))
    states = (_Exchange.apply(states, _HEADS, _TOKENS, group) for states in (query, key, value))
    output, _ = within(module, *states, None, **arguments)  # tokens are now dimension 1
    return _Exchange.apply(output, 1, 2, group), None


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention without a mask with PyTorch's SDPA, as a transformers attention function.

    Packed rows are separate calls: a mask would take memory for each pair of tokens, on every worker. The plan checks that no row
    is longer than a sliding window.

    Args:
        module: The attention layer; unused.
        query: (batch, heads, tokens, head_dim).
        key: (batch, key-value heads, tokens, head_dim).
        value: Same shape as key.
        attention_mask: Must be None.
        cu_seq_lens_q: Cumulative lengths of packed rows in tokens, (rows + 1); None: each sequence is one row.
        dropout: Probability of dropping an attention weight.
        scaling: Scale of the scores; None: 1 / sqrt(head_dim).

    Returns:
        The output, (batch, tokens, heads, head_dim), and None for the attention weights.
    """
    assert attention_mask is None
    lengths = [query.shape[_TOKENS]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    rows = zip(*(states.split(lengths, _TOKENS) for states in (query, key, value)), strict=True)
    is_grouped = key.shape[_HEADS] < query.shape[_HEADS]
    outputs = [
        scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=is_grouped
        )
        for queries, keys, values in rows
    ]
    return torch.cat(outputs, _TOKENS).transpose(_HEADS, _TOKENS), None


class _Exchange(torch.autograd.Function):
    """An all-to-all that divides one dimension among the workers of a group, and joins their parts of another dimension.

    Its gradient is the exchange in the opposite direction.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, divided: int, joined: int, group: Any) -> torch.Tensor:
        ctx.divided, ctx.joined, ctx.group = divided, joined, group
        return _exchange(states, divided, joined, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _exchange(gradients[0], ctx.joined, ctx.divided, ctx.group), None, None, None


def _exchange(states: torch.Tensor, divided: int, joined: int, group: Any) -> torch.Tensor:
    parts = torch.stack(states.chunk(dist.get_world_size(group), divided))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), joined)
