"""CPU kernels for torch's variable-length attention, which has only CUDA kernels: plain matrix products with the same results.

Importing this module registers them. Gradients are written out, since autograd does not trace inside a custom operator.
"""

from collections.abc import Iterator

import torch
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward  # pyright: ignore[reportPrivateUsage]


@_varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window, enable_gqa=True, *_
):
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert is_causal == (window == [-1, 0])
    assert enable_gqa or query.shape[1] == key.shape[1]
    result = torch.empty_like(query)
    for row in _rows(cu_seq_q):
        q, k, v = _by_head(query, key, value, row)
        result[row] = (_probabilities(q, k, scale, window) @ v).transpose(0, 1)
    return result, torch.empty(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal,
    rng_state,
    scale,
    window,
):
    gradients = [torch.empty_like(states) for states in (query, key, value)]
    for row in _rows(cu_seq_q):
        q, k, v = _by_head(query, key, value, row)
        grad = grad_out[row].transpose(0, 1)
        probabilities = _probabilities(q, k, scale, window)
        grad_probabilities = grad @ v.mT
        row_sums = (grad_probabilities * probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - row_sums) * scale
        head_gradients = grad_scores @ k, grad_scores.mT @ q, probabilities.mT @ grad
        for gradient, head_gradient in zip(gradients, head_gradients, strict=True):
            group_size = len(head_gradient) // gradient.shape[1]  # query heads per key head
            gradient[row] = head_gradient.unflatten(0, (-1, group_size)).sum(1).transpose(0, 1)
    return tuple(gradients)


def _rows(cu_seq: torch.Tensor) -> Iterator[slice]:
    offsets = cu_seq.tolist()
    yield from map(slice, offsets[:-1], offsets[1:])


def _by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: slice
) -> tuple[torch.Tensor, ...]:
    """Return each as (heads, tokens, head_dim), with keys and values repeated for every query head."""
    heads = query.shape[1]
    states = (packed[row].transpose(0, 1) for packed in (query, key, value))
    return tuple(state.repeat_interleave(heads // len(state), 0) for state in states)


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, window: list[int]) -> torch.Tensor:
    left, right = window
    assert right == 0
    positions = torch.arange(query.shape[1])
    distance = positions[:, None] - positions
    visible = (distance >= 0) & ((distance <= left) | (left < 0))
    return (query @ key.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
