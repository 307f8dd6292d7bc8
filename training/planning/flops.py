"""Model FLOPs per row: the operations that training requires, without recomputation."""

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
    """The FLOPs of one row, forward and backward; a multiply-add counts as two."""

    per_token: float
    """FLOPs per token in the matrices of the layers."""
    per_loss_token: float
    """FLOPs per loss token in the LM head."""
    attention: tuple[tuple[int | None, float], ...]
    """(window, FLOPs per query-key pair over all layers with this window); a window of None is full attention."""

    def of_row(self, tokens: int, loss_tokens: int) -> float:
        """Return the FLOPs of one row without padding."""
        return (
            self.per_token * tokens
            + self.per_loss_token * loss_tokens
            + sum(per_pair * pairs_in_view(tokens, window) for window, per_pair in self.attention)
        )


def pairs_in_view(tokens: int, window: int | None) -> int:
    """Return the number of query-key pairs in a row under causal attention with this window."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


def row_flops(
    shape: ModelShape,
    parameter_shapes: Mapping[str, tuple[int, ...]],
    *,
    is_trained: Callable[[str], bool],
    ranks: Mapping[str, int],
) -> RowFlops:
    """Count the training FLOPs of a model from its shapes.

    A matrix of n entries takes 2n per token for the forward pass, 2n for the gradient of its input if an earlier parameter is
    trained, and 2n for its own gradient if it is trained. That is 6n in full-parameter training (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1), and about 4n for a frozen matrix under an adapter. Attention takes 4 x heads x head_dim per
    query-key pair, and twice that backward (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, which also counts masked pairs).

    Not counted:
        - padding, masked query-key pairs, and the LM head at tokens without loss;
        - recomputation (gradient checkpointing, attention scores in flash kernels);
        - elementwise work (norms, activation functions, softmax, the optimizer).

    Args:
        shape: The model's dimensions.
        parameter_shapes: Shapes of all base parameters by name; a tied head may be missing.
        is_trained: Returns whether a base parameter is trained.
        ranks: Module -> rank of its adapter.
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
    per_token = per_loss_token = 0.0

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
            per_loss_token += flops
        else:
            per_token += flops
    if not any(is_head(name) for name in matrices):  # tied to the embedding
        head_is_trained = any(is_embedding(name) for name in trained)
        passes_on = first_trained < (shape.layers, 1)
        per_loss_token += 2.0 * shape.vocabulary * shape.hidden * (1 + passes_on + head_is_trained)

    attention: dict[int | None, float] = {}
    for layer, window in enumerate(shape.windows):
        goes_back = first_trained < (layer, ATTENTION_OUTPUT)
        flops = 4.0 * shape.heads * shape.head_dim * (1 + 2 * goes_back)
        attention[window] = attention.get(window, 0.0) + flops
    return RowFlops(per_token, per_loss_token, tuple(attention.items()))
