"""Liger provider: stock transformers models with Liger's Triton kernels in the layers (GPU only)."""

from typing import TYPE_CHECKING

from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

from training.models import torch_provider
from training.models.request import ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(request: ModelRequest) -> "PreTrainedModel":
    """Build the model with fused RMSNorm, RoPE and SwiGLU.

    TRL's loss is kept, since it does not materialize the full logits either.
    """
    model = torch_provider.load_base(request)
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return torch_provider.with_adapter(model, request)
