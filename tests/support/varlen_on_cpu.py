"""torch's flash kernels for rows in one line, which are CUDA's alone, as plain matrix products on CPU: same arguments, same results.

Importing it registers them. They are written out, gradients too: autograd sees nothing of what happens inside an operator.
"""

from collections.abc import Iterator

import torch
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward  # pyright: ignore[reportPrivateUsage]


@_varlen_attn.register_kernel("cpu")
def _forward(query, key, value, ends, ends_of_keys, max_q, max_k, is_causal, scale, window, enable_gqa, *_):
    assert torch.equal(ends, ends_of_keys)
    assert ends.dtype == torch.int32
    assert max_q == max_k == int(ends.diff().max())
    assert is_causal == (window == [-1, 0])
    assert enable_gqa or query.shape[1] == key.shape[1]
    result = torch.empty_like(query)
    for row in _rows(ends):
        q, k, v = _by_head(query, key, value, row)
        result[row] = (_probabilities(q, k, scale, window) @ v).transpose(0, 1)
    return result, torch.empty(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad, query, key, value, out, lse, ends, ends_of_keys, max_q, max_k, is_causal, rng, scale, window
):
    gradients = [torch.empty_like(states) for states in (query, key, value)]
    for row in _rows(ends):
        q, k, v = _by_head(query, key, value, row)
        given = grad[row].transpose(0, 1)
        seen = _probabilities(q, k, scale, window)
        by_seen = given @ v.mT
        by_score = seen * (by_seen - (by_seen * seen).sum(-1, keepdim=True)) * scale
        of_heads = by_score @ k, by_score.mT @ q, seen.mT @ given
        for gradient, of_head in zip(gradients, of_heads, strict=True):
            shared = len(of_head) // gradient.shape[1]  # query heads that have one key
            gradient[row] = of_head.unflatten(0, (-1, shared)).sum(1).transpose(0, 1)
    return tuple(gradients)


def _rows(ends: torch.Tensor) -> Iterator[slice]:
    places = ends.tolist()
    yield from map(slice, places[:-1], places[1:])


def _by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: slice
) -> tuple[torch.Tensor, ...]:
    """(heads, tokens, head_dim) of each, keys and values once for each query head."""
    heads = query.shape[1]
    states = (line[row].transpose(0, 1) for line in (query, key, value))
    return tuple(state.repeat_interleave(heads // len(state), 0) for state in states)


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, window: list[int]) -> torch.Tensor:
    left, right = window
    assert right == 0
    places = torch.arange(query.shape[1])
    distance = places[:, None] - places
    seen = (distance >= 0) & ((distance <= left) | (left < 0))
    return (query @ key.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
