"""Merging of an adapter into its base model in fp32, one module at a time, with one rounding at the end."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from training.models.files import ADAPTER_FILE
from training.models.torch_provider import attach_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_PREFIX = "base_model.model."


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
    stored = _StoredWeights(model, base, adapter)
    adapted: Any = attach_adapter(model, adapter)
    was_tied = _untie(adapted)
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
def _in_fp32(module: Any, name: str, stored: "_StoredWeights") -> Iterator[None]:
    """Give the base weights of an adapted module in fp32, and round them to their dtype afterwards."""
    base = module.get_base_layer()
    names = [module.parameter_name] if hasattr(module, "parameter_name") else ["weight", "bias"]
    weights = {each: value for each in names if isinstance(value := getattr(base, each, None), torch.Tensor)}
    dtypes = {each: value.dtype for each, value in weights.items()}
    for each, value in weights.items():
        if value.dtype == torch.float32:
            continue
        original = stored.read(f"{name.replace('.base_layer', '')}.{each}")
        is_same = original is not None and original.shape == value.shape
        value.data = (original if original is not None and is_same else value.data).to(torch.float32)
    yield
    for each, value in weights.items():
        value.data = value.data.to(dtypes[each])


class _StoredWeights:
    """The weights under an adapter as the files store them, without rounding to the dtype in which the base model is loaded.

    PEFT saves trained biases, and an embedding that has an adapter, with the adapter, and loads them over those of the base model.

    transformers loads some weights under other names, and fuses some: the experts of a layer, which most files store one by one,
    become one parameter. Its own conversions of this model are used here.
    """

    def __init__(self, model: "PreTrainedModel", directory: Path, adapter: Path):
        """Find the tensors of each parameter.

        Args:
            model: The model that transformers has loaded from the files.
            directory: Local directory of its files.
            adapter: Local directory of the adapter.
        """
        conversions = getattr(model, "_weight_conversions", None) or []
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        parameters = model.state_dict()
        self._model = model
        self._files = dict(_files_of_tensors(directory))
        self._adapter = adapter / ADAPTER_FILE
        with safe_open(self._adapter, "pt") as tensors:
            self._replaced = {
                name.removeprefix(_PREFIX).replace(".base_layer", ""): name
                for name in tensors.keys()  # noqa: SIM118
                if name.endswith((".base_layer.weight", ".base_layer.bias"))
            }
        """Parameter of the base model -> the adapter's tensor that replaces it."""
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        """Parameter -> its tensors in the files, each with the pattern of the conversion that matches it."""
        self._converters: dict[str, WeightConverter] = {}
        for stored in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, parameters
            )
            if name not in parameters and stored in parameters:
                name, pattern = stored, None
            names = [name]
            if pattern is not None:
                first, *others = by_pattern[pattern].target_patterns
                names += [name.replace(first, other) for other in others]
                self._converters |= dict.fromkeys(names, by_pattern[pattern])
            for each in names:
                self._sources.setdefault(each, []).append((stored, pattern))

    def read(self, parameter: str) -> torch.Tensor | None:
        """Return a parameter as stored, or None if it is not in the files, or quantized."""
        if parameter in self._replaced:
            with safe_open(self._adapter, "pt") as tensors:
                return tensors.get_tensor(self._replaced[parameter])
        sources = self._sources.get(parameter, [])
        tensors = [self._tensor(stored) for stored, _ in sources]
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
            return None
        if parameter not in self._converters:
            return tensors[0]
        converter: Any = deepcopy(self._converters[parameter])  # its signatures name futures only
        for (stored, pattern), tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(parameter, stored, pattern, tensor)
        found = converter.convert(parameter, model=self._model, config=self._model.config).get(parameter)
        return found[0] if isinstance(found, list) else found

    def _tensor(self, stored: str) -> torch.Tensor:
        with safe_open(self._files[stored], "pt") as tensors:
            return tensors.get_tensor(stored)


def _files_of_tensors(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of each tensor of a model with its file."""
    index = directory / _INDEX
    if index.exists():
        for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items():
            yield name, directory / file
        return
    file = directory / "model.safetensors"  # transformers loads no other one
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield name, file


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
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    record_tying(model)


def record_tying(model: Any) -> None:
    """Make the config of a model say whether its LM head is the embedding.

    transformers loads a stored head that differs from the embedding even if the config says that it is tied; other programs do not.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = head.weight is embedding.weight
