"""How many floating-point operations a row is worth: what training needs, whatever is computed on top."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from training.models.architecture import (
    ATTENTION_OUTPUT,
    ModelShape,
    is_embedding,
    is_head,
    position,
    share_of_experts,
)

_OTHER_MODALITY = re.compile(r"(^|\.)(vision|visual|audio|multi_modal)")


@dataclass(frozen=True)
class RowFlops:
    """What one row takes, forward and backward, in floating-point operations; a multiplication and an addition are two."""

    per_token: float
    """Of the matrices of the layers."""
    per_trained_token: float
    """Of the head: only where the loss looks."""
    attention: tuple[tuple[int | None, float], ...]
    """For each kind of layer its window (None: the whole row), and what a pair of a token and one it sees takes, in all such
    layers together."""

    def of_row(self, tokens: int, trained_tokens: int) -> float:
        """A row by itself, nothing of it padded."""
        return (
            self.per_token * tokens
            + self.per_trained_token * trained_tokens
            + sum(per_pair * pairs_in_view(tokens, window) for window, per_pair in self.attention)
        )


def pairs_in_view(tokens: int, window: int | None) -> int:
    """How many pairs of a token and one that it sees (itself and those before it) a row has."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


def row_flops(
    shape: ModelShape,
    parameter_shapes: Mapping[str, tuple[int, ...]],
    *,
    is_trained: Callable[[str], bool],
    ranks: Mapping[str, int],
) -> RowFlops:
    """Count from shapes what training needs.

    A matrix of n entries takes 2n a token forward, 2n for the gradient of its input where something before it is trained, and 2n
    for its own gradient where it is trained: 6n in full-parameter training (Kaplan et al. 2020, arXiv 2001.08361, section 2.1),
    about 4n where it is frozen below an adapter. Attention takes 4 x heads x head_dim for each pair of a token and one that it sees,
    and twice that backward (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, which counts the unseen half as well).

    Left out is what is no use by itself: padding, tokens that a causal mask or a window hides, the head where no loss looks,
    everything that is computed a second time (gradient checkpointing, attention scores in flash kernels), and what grows with
    vectors only (norms, activation functions, softmax, the optimizer).

    Args:
        shape: The model.
        parameter_shapes: Every parameter of the base by its name; tied heads may be left out.
        is_trained: Whether a parameter of the base is.
        ranks: Module -> rank, where an adapter sits.
    """
    matrices = {
        name: math.prod(size) * share_of_experts(shape, name)
        for name, size in parameter_shapes.items()
        if len(size) > 1 and not is_embedding(name) and not _OTHER_MODALITY.search(name)
    }
    trained = {name for name in parameter_shapes if is_trained(name)}
    adapted = {f"{module}.weight": rank for module, rank in ranks.items()}
    first_trained = min(
        (position(shape, name) for name in (*trained, *adapted)), default=(shape.layers + 1, 0)
    )
    per_token = per_trained_token = 0.0

    for name, entries in matrices.items():
        passes_on = first_trained < position(shape, name)
        flops = 2.0 * entries * (1 + passes_on + (name in trained))
        if rank := adapted.get(name):
            outputs, inputs = parameter_shapes[name][-2:]
            forward = 2.0 * rank * (inputs + outputs)
            flops += share_of_experts(shape, name) * (
                2 * forward + 2.0 * rank * (outputs + inputs * passes_on)
            )
        if is_head(name):
            per_trained_token += flops
        else:
            per_token += flops
    if not any(is_head(name) for name in matrices):  # tied to the embedding
        head_is_trained = any(is_embedding(name) for name in trained)
        passes_on = first_trained < (shape.layers, 1)
        per_trained_token += 2.0 * shape.vocabulary * shape.hidden * (1 + passes_on + head_is_trained)

    attention: dict[int | None, float] = {}
    for layer, window in enumerate(shape.windows):
        goes_back = first_trained < (layer, ATTENTION_OUTPUT)
        flops = 4.0 * shape.heads * shape.head_dim * (1 + 2 * goes_back)
        attention[window] = attention.get(window, 0.0) + flops
    return RowFlops(per_token, per_trained_token, tuple(attention.items()))
