"""Model architecture without weights: support in transformers, packing support, dimensions and parameter shapes."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.models.files import ALL_WEIGHTS, ModelError, ModelFacts
from utils.errors import first_line, last_line
from utils.processes import importing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]

_MASKED_LAYERS = {"full_attention", "sliding_attention"}
_MASKS_WITHOUT_POSITIONS = {"afmoe", "doge", "gpt_oss", "moshi", "opt"}  # found by testing
# Tensors that bitsandbytes stores beside a packed matrix, whose name theirs begin with.
_PACKING = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|word_embeddings|embed_in|wte|wpe)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_EXPERT = re.compile(r"\.experts\.")
_ROUTER = re.compile(r"\.(gate|router)\.")
_LAYER = re.compile(r"\.(\d+)\.")
# Stages of a layer in order of execution. A name that matches no stage counts as MLP_INPUT.
_STAGES = (
    re.compile(r"\.(input_layernorm|ln_1)\."),
    re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn)\."),
    re.compile(r"\.(o_proj|attention\.dense|attn\.c_proj)\."),
    re.compile(
        r"\.(post_attention_layernorm|ln_2|gate_proj|up_proj|gate_up_proj|c_fc|dense_h_to_4h|w1|w3)\."
    ),
    re.compile(r"\.(down_proj|mlp\.c_proj|dense_4h_to_h|w2)\."),
)
_OTHER_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM")
_TEXT_CONFIGS = ("text_encoder", "decoder", "generator", "text_config")
"""Keys of a config.json that transformers takes for the config of a language model."""
_CALLER_SETTINGS = {
    "return_dict": True,
    "output_attentions": False,
    "fusion_config": None,
    "distributed_config": None,
}
"""Keys of a config.json that only a caller should set, with the values that training needs."""
ATTENTION_OUTPUT, MLP_INPUT = 2, 3
"""Stages of a layer, as returned by `position`."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder whose layers consist of attention and an MLP."""

    layers: int
    hidden: int
    intermediate: int
    """Hidden size of the MLP, or of one expert."""
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens, including the current token; None for full attention."""
    experts: int
    """Experts per layer; 0 for a dense model."""
    experts_per_token: int


@dataclass(frozen=True)
class MetaModel:
    """A base model on PyTorch's meta device: its modules and shapes before quantization, without weights."""

    source: str
    """Name of the model in messages."""
    model: "PreTrainedModel"

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return the name and shape of every parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}


def is_embedding(parameter: str) -> bool:
    """Return whether the name is that of a token or position embedding."""
    return _EMBEDDING.search(parameter) is not None


def is_head(parameter: str) -> bool:
    """Return whether the name is that of an LM head. A tied head has the embedding's name."""
    return _HEAD.search(parameter) is not None


def is_expert(parameter: str) -> bool:
    """Return whether the name is that of a mixture-of-experts parameter."""
    return _EXPERT.search(parameter) is not None


def is_router(parameter: str) -> bool:
    """Return whether the name is that of a parameter which chooses the experts of a token."""
    return _ROUTER.search(parameter) is not None


def share_of_experts(shape: ModelShape, parameter: str) -> float:
    """Return the fraction of a matrix that processes each token; with a mixture, only the active experts do."""
    return shape.experts_per_token / shape.experts if shape.experts and is_expert(parameter) else 1.0


def position(shape: ModelShape, parameter: str) -> tuple[int, int]:
    """Return (layer, stage) of a parameter; the embedding has layer -1, final norm and head come after the last layer."""
    if is_embedding(parameter):
        return (-1, 0)
    layer = _LAYER.search(parameter)
    if layer is None:
        return (shape.layers, 1 if is_head(parameter) else 0)
    stages = (stage for stage, names in enumerate(_STAGES) if names.search(parameter))
    return (int(layer[1]), next(stages, MLP_INPUT))


def check_custom_code(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Check that a model's own code is trusted if the model needs it, and that it is there if it is trusted.

    Code is not downloaded with a model, so that what runs is what the user has reviewed. transformers downloads code that auto_map
    names in another repository.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    with importing():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = json.loads((directory / "config.json").read_text("utf-8"))
    named: dict[str, str] = fields.get("auto_map") or {}
    kind = fields.get("model_type")
    known = {"AutoConfig": CONFIG_MAPPING, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for key in [key for key in known if key in named]:
        if not trust_remote_code and kind not in known[key]:
            raise ModelError(
                f"model {source}: transformers does not know its type {kind}; auto_map in config.json names its own code, {named[key]}. "
                "Review that code, then write trust_remote_code: true."
            )
        file = f"{str(named[key]).rpartition('.')[0]}.py"
        if trust_remote_code and "--" not in file and not (directory / file).exists():
            raise ModelError(
                f"model {source}: auto_map in config.json names {named[key]}, but {file} is missing, because code is not downloaded with a "
                "model. Download the model yourself, review its code, and write the local directory as model_id."
            )


def check_is_causal(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Check that the model is a causal language model with its own head; transformers would add a random head to others.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    with importing():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(directory, source, trust_remote_code)
    architecture = (config.architectures or [None])[0]
    has_head = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if has_head and architecture is not None:
        # Without is_decoder, transformers loads encoders such as BERT as a decoder with bidirectional attention.
        looks_ahead = getattr(config, "is_decoder", None) is False
        is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        has_head = is_causal or not (looks_ahead or architecture.endswith(_OTHER_HEADS))
    has_head = has_head or (trust_remote_code and _has_custom_code(config))
    if config.is_encoder_decoder or not has_head:
        raise ModelError(
            f"model {source}: not a causal language model, but {architecture or 'a model'} of type {config.model_type}. Use a "
            "model whose architecture is a …ForCausalLM class."
        )


def check_packing(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Check that the model keeps packed rows separate.

    Only attention may mix tokens, and it must mask by position ids, which restart at 0 with each row.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    config = load_config(directory, source, trust_remote_code)
    model_class = causal_model_class(config, trust_remote_code=trust_remote_code)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or [])
    if model_class is None:
        reason = "its code is not part of transformers, so it is unknown whether it separates packed rows"
    elif model_class._is_stateful or not layers <= _MASKED_LAYERS:
        reason = "its layers carry state from one packed row into the next"
    elif config.model_type in _MASKS_WITHOUT_POSITIONS or getattr(config, "is_decoder", False):
        reason = (
            "its attention masks are built without position ids, so packed rows would attend to each other"
        )
    elif (
        "position_ids" not in signature(model_class.forward).parameters
        or not model_class._supports_attention_backend
    ):
        reason = "its attention ignores position ids, so packed rows would attend to each other"
    elif not model_class._supports_sdpa:
        reason = "transformers has only eager attention for it, with which packed rows are not tested"
    else:
        return
    raise ModelError(f"packing: not supported by the model {source}: {reason}. Set packing: false.")


def check_tensors(base: MetaModel, facts: ModelFacts) -> list[str]:
    """Check that the weight files have every parameter in the shape that config.json requires.

    The tensors are loaded without their values, so that transformers renames, combines and ties them as in training. Not checked
    are custom code that loads its weights in its own way, and quantized files with other names than the model's.

    Args:
        base: The model.
        facts: The same model, with the tensors of its weight files; plain ones, or bitsandbytes' 4 bits.

    Returns:
        Names of the tensors that the model does not use, without those that transformers expects in some files.

    Raises:
        ModelError: A parameter is missing, or its tensor has another shape.
    """
    import torch

    with importing():
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

    model = base.model
    stored = _unpacked(facts, base.shapes) if facts.quantization else facts.parameter_shapes
    if stored is None or _loads_in_its_own_way(type(model)):
        return []
    tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    settings = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model),  # pyright: ignore[reportArgumentType]
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    with _without_progress_bar():
        loaded, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    model.tie_weights(missing_keys=loaded.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(loaded)
    faults = [
        f"{name} in the shape {list(required)}, but {facts.file_of(name)} has {list(found)}"
        for name, found, required in sorted(loaded.mismatched_keys)
    ]
    combined = loaded.conversion_errors
    faults += [
        f"{name}, of which {facts.file_of(name)} lacks a tensor, or has one in another shape"
        for name in sorted(combined)
    ]
    check_complete(
        model, facts.source, loaded.missing_keys - combined.keys(), faults=faults, file_of=facts.file_of
    )
    return sorted(loaded.unexpected_keys)


def check_complete(
    model: "PreTrainedModel",
    source: str,
    missing: Iterable[str],
    *,
    faults: Sequence[str] = (),
    file_of: Callable[[str], str] = lambda _: ALL_WEIGHTS,
) -> None:
    """Check that no parameter is missing from the weight files. A buffer that older files lack gets its constant initial value.

    Args:
        model: The model.
        source: Name of the model in messages.
        missing: Names of parameters and buffers that transformers has not found in the files.
        faults: Other parameters that the files do not have as required, each with the reason.
        file_of: Returns the weight file that lacks a parameter, as messages name it.

    Raises:
        ModelError: A parameter is missing, or there are other faults.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = [
        f"{name}, which is missing from {file_of(name)}" for name in sorted(parameters.intersection(missing))
    ]
    if wrong := [*faults, *lacking]:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(
            f"model {source}: config.json requires {wrong[0]}{more}. Copy the complete model again, or correct config.json."
        )


def _loads_in_its_own_way(kind: type) -> bool:
    """Return whether custom code has replaced the loading of transformers."""
    return any(
        "from_pretrained" in vars(each) and not each.__module__.startswith("transformers.")
        for each in kind.__mro__
    )


def _unpacked(facts: ModelFacts, required: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """Return the shapes that bitsandbytes' 4-bit tensors have before quantization; None if they have other names than the model's."""
    packed = {name for name in facts.tensors if f"{name}.absmax" in facts.tensors}
    if not packed <= required.keys():
        return None
    return {
        name: required[name]
        if name in packed and (math.prod(required[name]) + 1) // 2 == tensor.size
        else tensor.shape
        for name, tensor in facts.tensors.items()
        if not _PACKING.search(name)
    }


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def build_on_meta_device(directory: Path, source: str, *, trust_remote_code: bool) -> MetaModel:
    """Build a model without weights; raise ModelError if transformers or the model's own code cannot.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    import torch

    with importing():
        from transformers import AutoModelForCausalLM

    config = load_config(directory, source, trust_remote_code)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    try:
        with importing(), torch.device("meta"):  # this imports the model's module
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture fails in its own way, and so does custom code
        fields = json.loads((directory / "config.json").read_text("utf-8"))
        key = _key_of(fields, error.args[0]) if isinstance(error, KeyError) else None
        reason = f"{key}: {error.args[0]} is unknown" if key else first_line(error)
        raise ModelError(
            f"model {source}: the model that its config.json describes cannot be built ({reason}). Copy config.json again from "
            "the original model, or use a model that the installed transformers supports."
        ) from error
    return MetaModel(source, model)


def _key_of(fields: Mapping[str, Any], value: object) -> str | None:
    """Return the key of a config.json that has a value, with those of the objects around it; None if there is none."""
    for key, found in fields.items():
        if found == value:
            return key
        if isinstance(found, dict) and (inner := _key_of(found, value)):
            return f"{key}.{inner}"
    return None


def model_shape(directory: Path, source: str, *, trust_remote_code: bool) -> ModelShape | None:
    """Return the model's dimensions, or None if its layer types are not supported by the estimates.

    Args:
        directory: Local directory with the model's config; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the model directory may be executed.
    """
    text: Any = load_config(directory, source, trust_remote_code).get_text_config()
    fields = text.to_dict()  # excludes attribute defaults of other architectures
    layers, heads, intermediate = (
        getattr(text, name, None)
        for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    kinds = fields.get("layer_types") or []
    if (
        not layers
        or not heads
        or not intermediate
        or fields.get("kv_lora_rank")
        or not set(kinds) <= _MASKED_LAYERS
    ):
        return None
    experts = count_experts(text)
    window = fields.get("sliding_window")
    return ModelShape(
        layers=layers,
        hidden=text.hidden_size,
        intermediate=(fields.get("moe_intermediate_size") or intermediate) if experts else intermediate,
        heads=heads,
        key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds)
        if kinds
        else (window if fields.get("use_sliding_window", True) else None,) * layers,
        experts=experts,
        experts_per_token=fields.get("num_experts_per_tok") or 0,
    )


def count_experts(text: Any) -> int:
    """Return the number of experts per layer from a text config; 0 for a dense model."""
    fields = text.to_dict()  # excludes attribute defaults of other architectures
    return fields.get("num_local_experts") or fields.get("num_experts") or 0


def causal_model_class(config: Any, *, trust_remote_code: bool) -> Any:
    """Return the class of transformers that AutoModelForCausalLM builds from a config; None for custom code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if trust_remote_code and _has_custom_code(config):
        return None
    with importing():  # this imports the model's module
        return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _has_custom_code(config: Any) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def load_config(directory: Path, source: str, trust_remote_code: bool) -> Any:
    """Return the config of transformers; raise ModelError if transformers cannot read it, or load the model with it."""
    with importing():
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, PreTrainedConfig

    try:
        with importing():  # this imports the model's configuration, and with it much of torch
            config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            text = config.get_text_config()
    except StrictDataclassError as error:
        reason = last_line(error)  # the first line names a function of transformers
        raise ModelError(
            f"model {source}: config.json is invalid ({reason}). Correct it in a copy of the model, or copy it again from the original model."
        ) from error
    except Exception as error:  # each architecture checks its fields in its own way
        raise ModelError(
            f"model {source}: transformers cannot read its config.json ({first_line(error)}). Use a model that the installed "
            "transformers supports. A model with custom code also needs trust_remote_code: true."
        ) from error
    where = f"model {source}: config.json"
    if not isinstance(text, PreTrainedConfig):
        key = next(key for key in _TEXT_CONFIGS if getattr(config, key, None) is text)
        raise ModelError(
            f"{where}: {key} is {text!r}, but {config.model_type} has no such part. Remove {key} in a copy of the model."
        )
    for part in (config, text):
        for key, usual in _CALLER_SETTINGS.items():
            value = getattr(part, key, usual)
            if value not in (usual, None):
                raise ModelError(
                    f"{where}: {key} is {value!r}, but the training decides how the model is loaded and what it returns. Remove "
                    f"{key} in a copy of the model."
                )
    return config


def most_positions(config: Any) -> int | None:
    """Return the maximum context in tokens of a model's configuration, or None if it has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
