"""Models: files, architecture, adapters, tokenizer, and one module per kernel provider, which is imported only when selected."""

from typing import TYPE_CHECKING

from training.models.kernels import Provider
from training.models.request import ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(provider: Provider, request: ModelRequest) -> "PreTrainedModel":
    """Load the base model, attach the adapter and apply the provider's kernels."""
    if provider == "unsloth":
        from training.models import unsloth_provider

        return unsloth_provider.build(request)
    if provider == "liger":
        from training.models import liger_provider

        return liger_provider.build(request)
    from training.models import torch_provider

    return torch_provider.build(request)


def add_reference(model: "PreTrainedModel", request: ModelRequest) -> "PreTrainedModel | None":
    """Add the reference for preference tuning: the model in its initial state.

    Returns:
        A second model in full-parameter training, else None. For the reference, a new adapter is disabled, and a continued
        adapter is replaced by its frozen copy REFERENCE_ADAPTER.
    """
    from training.models import torch_provider

    if not request.is_lora:
        return torch_provider.load_base(request)
    if request.adapter_directory is not None:
        torch_provider.add_frozen_copy(model, request)
    return None
