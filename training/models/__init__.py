"""A plan's model, ready to train: one module per kernel provider, one interface, imported only when chosen."""

from typing import TYPE_CHECKING

from training.models.kernels import Provider
from training.models.request import ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(provider: Provider, request: ModelRequest) -> "PreTrainedModel":
    """Load the base, put the adapter on it, and apply the provider's kernels."""
    if provider == "unsloth":
        from training.models import unsloth_provider

        return unsloth_provider.build(request)
    if provider == "liger":
        from training.models import liger_provider

        return liger_provider.build(request)
    from training.models import torch_provider

    return torch_provider.build(request)


def add_reference(model: "PreTrainedModel", request: ModelRequest) -> "PreTrainedModel | None":
    """What preference tuning compares a built model with: the model as it is now.

    Returns:
        A second model in full-parameter training. None for adapters: a new one is turned off, a continued one gets a frozen copy of
        itself, called REFERENCE_ADAPTER.
    """
    from training.models import torch_provider

    if not request.is_lora:
        return torch_provider.load_base(request)
    if request.adapter_directory is not None:
        torch_provider.add_frozen_copy(model, request)
    return None
