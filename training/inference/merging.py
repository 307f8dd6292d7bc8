"""Merging of an adapter into its base model in fp32, one module at a time, with one rounding at the end."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open

from training.models.torch_provider import attach_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_PREFIX = "base_model.model."

StoredTensor = Callable[[str], torch.Tensor | None]
"""Returns a tensor of the base model's files by its name, or None."""


def merge_adapter(model: "PreTrainedModel", base: Path, adapter: Path) -> "PreTrainedModel":
    """Merge an adapter into a base model and return the plain model, with every weight in the dtype that it had.

    Each adapted weight is computed in fp32, from the base weight as it is stored, and rounded once. Tied embeddings are separated
    if the adapter changes only one of them.

    Args:
        model: The base model in the dtype of the merged model.
        base: Local directory of its files.
        adapter: Local directory of the adapter.
    """
    dtype = model.dtype
    adapted: Any = attach_adapter(model, adapter)
    was_tied = _untie(adapted)
    stored = _stored_tensors(base)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT warns that the modules are already merged, and of untied embeddings
        for name, module in reversed(list(adapted.named_modules())):  # inner modules first
            if isinstance(module, LoraLayer):
                with _in_fp32(module, name.removeprefix(_PREFIX), stored):
                    module.merge()
        in_full = [module for module in adapted.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        merged = adapted.merge_and_unload(safe_merge=False)
    if in_full:
        _cast_ends(merged, dtype)
    if was_tied:
        _tie_if_equal(merged)
    return merged


@contextmanager
def _in_fp32(module: Any, name: str, stored: StoredTensor) -> Iterator[None]:
    """Give the base weights of an adapted module in fp32, and round them to their dtype afterwards."""
    base = module.get_base_layer()
    names = [module.parameter_name] if hasattr(module, "parameter_name") else ["weight", "bias"]
    weights = {each: value for each in names if isinstance(value := getattr(base, each, None), torch.Tensor)}
    dtypes = {each: value.dtype for each, value in weights.items()}
    for each, value in weights.items():
        if value.dtype == torch.float32:
            continue
        original = stored(f"{name.replace('.base_layer', '')}.{each}")
        is_same = original is not None and original.shape == value.shape and each == "weight"
        value.data = (original if original is not None and is_same else value.data).to(torch.float32)
    yield
    for each, value in weights.items():
        value.data = value.data.to(dtypes[each])


def _stored_tensors(directory: Path) -> StoredTensor:
    index = directory / _INDEX
    files: dict[str, Path] = {}
    if index.exists():
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files = {name: directory / file for name, file in weight_map.items()}
    else:
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)

    def read(name: str) -> torch.Tensor | None:
        if name not in files:
            return None
        with safe_open(files[name], "pt") as tensors:
            tensor = tensors.get_tensor(name)
        return tensor if tensor.is_floating_point() else None

    return read


def _untie(adapted: Any) -> bool:
    """Give the LM head its own copy of the tied embedding if an adapter changes one of them; return whether it did."""
    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return False
    ends = {id(module) for end in (head, embedding) for module in end.modules()}
    changed = any(
        id(module) in ends and isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
        for module in adapted.modules()
    )
    if not changed:
        return False
    shared = {id(weight) for name, weight in embedding.named_parameters() if name.endswith("weight")}
    for module in head.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in shared:
            module.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    return True


def _cast_ends(model: Any, dtype: torch.dtype) -> None:
    """Round weights that were trained in full, which PEFT keeps in fp32."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in end.parameters() if end is not None else ():
            parameter.data = parameter.data.to(dtype)


def _tie_if_equal(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
