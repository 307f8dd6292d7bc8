"""What a model's architecture says without its weights: whether transformers knows it, and every parameter's shape."""

import re
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from configs.schema import LoraConfig
from training.models.files import ModelError, first_line
from utils.processes import importing

_MASKED_LAYERS = {"full_attention", "sliding_attention"}
_MASKS_OF_THEIR_OWN = {"afmoe", "doge", "moshi", "opt"}  # which do not go by positions, as was tried
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|word_embeddings|embed_in|wte|wpe)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_EXPERT = re.compile(r"\.experts\.")
_LAYER = re.compile(r"\.(\d+)\.")
# Within a layer each stage reads what the stages before it made. A name that none has is taken to be of MLP_INPUT.
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
ATTENTION_OUTPUT, MLP_INPUT = 2, 3
"""Stages of a layer, as `position` gives them."""


PACKED_WITHOUT_MASK = frozenset(
    {
        "cohere2",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
"""Kinds of models, as transformers calls them, that hand on to attention where packed rows end (training/models/varlen_attention.py); each
is tested. Others get a mask."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder whose layers are attention and an MLP."""

    kind: str
    """As transformers calls it."""
    layers: int
    hidden: int
    intermediate: int
    """Of the MLP, or of one expert."""
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """For each layer, how many tokens back its attention sees, itself counted; None: all."""
    caps_scores: bool
    """Attention's scores are squeezed below a limit, which torch's own attention cannot do."""
    experts: int
    """0: no mixture."""
    experts_per_token: int


def is_embedding(parameter: str) -> bool:
    """Whether a parameter is looked up by token or position, by its name."""
    return _EMBEDDING.search(parameter) is not None


def is_head(parameter: str) -> bool:
    """Whether a parameter makes logits, by its name; a tied one has the embedding's."""
    return _HEAD.search(parameter) is not None


def is_expert(parameter: str) -> bool:
    """Whether a parameter is of a mixture's experts, by its name."""
    return _EXPERT.search(parameter) is not None


def share_of_experts(shape: ModelShape, parameter: str) -> float:
    """Which part of a matrix a token goes through: a mixture takes some of its experts."""
    return shape.experts_per_token / shape.experts if shape.experts and is_expert(parameter) else 1.0


def position(shape: ModelShape, parameter: str) -> tuple[int, int]:
    """Where a parameter is used: its layer (-1: the embedding; behind all layers: the head), and the stage in it."""
    if is_embedding(parameter):
        return (-1, 0)
    layer = _LAYER.search(parameter)
    if layer is None:
        return (shape.layers, 1 if is_head(parameter) else 0)
    stages = (stage for stage, names in enumerate(_STAGES) if names.search(parameter))
    return (int(layer[1]), next(stages, MLP_INPUT))


def check_is_causal(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Make sure that what is trained is a causal language model with its own head, before transformers gives it a random one.

    Args:
        directory: The model's files on this node; its weights are not needed.
        source: What messages call the model.
        trust_remote_code: Whether code that lies beside them may run.

    Raises:
        ModelError: it is an encoder, a classifier, a vision model, …
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _load_config(directory, source, trust_remote_code)
    architecture = (config.architectures or [None])[0]
    has_head = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if has_head and architecture is not None:
        # Of an encoder, BERT or a relative, transformers makes a decoder that looks ahead, unless is_decoder is set.
        looks_ahead = getattr(config, "is_decoder", None) is False
        is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        has_head = is_causal or not (looks_ahead or architecture.endswith(_OTHER_HEADS))
    brings_its_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (has_head or brings_its_own):
        raise ModelError(
            f"model {source}: it is no causal language model, but {architecture or 'a model'} of type {config.model_type}. Name one "
            "that generates text from left to right, as classes called …ForCausalLM do."
        )


def check_packing(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Make sure that rows packed into one sequence stay apart in the model: only attention joins tokens, and transformers
    masks it by the positions, which begin anew with each row.

    Args:
        directory: The model's files on this node; its weights are not needed.
        source: What messages call the model.
        trust_remote_code: Whether code that lies beside them may run.

    Raises:
        ModelError: they do not, or nobody can tell.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _load_config(directory, source, trust_remote_code)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or [])
    if model_class is None:
        reason = "its code is not transformers' own, so nobody can tell whether packed rows stay apart in it"
    elif model_class._is_stateful or not layers <= _MASKED_LAYERS:
        reason = "its layers carry what they read from one packed row into the next"
    elif config.model_type in _MASKS_OF_THEIR_OWN or getattr(config, "is_decoder", False):
        reason = "it makes its attention masks by itself, and packed rows would see one another"
    elif "position_ids" not in signature(model_class.forward).parameters or not (
        model_class._supports_attention_backend and model_class._supports_sdpa
    ):
        reason = "its attention does not go by positions, so packed rows would see one another"
    else:
        return
    raise ModelError(f"packing: the model {source} cannot take it: {reason}. Write packing: false.")


def parameter_shapes(directory: Path, source: str, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape as the model is built, before anything packs or quantises it.

    Raises:
        ModelError: the model cannot be built.
    """
    model = _without_numbers(directory, source, trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def adapter_shapes(
    directory: Path, source: str, lora: LoraConfig, *, trust_remote_code: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that is trained with a new adapter, as PEFT puts it on the model.

    Raises:
        ModelError: the model cannot be built, or takes no such adapter.
    """
    import peft
    import torch

    model = _without_numbers(directory, source, trust_remote_code)
    try:
        with torch.device("meta"):
            # How it starts decides no shape, and not all ways go without numbers.
            settings: dict[str, Any] = lora.model_dump() | {"init_lora_weights": True}
            adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    except ValueError as error:
        raise ModelError(f"lora_config: {source} cannot take this adapter: {first_line(error)}") from error
    return {name: tuple(entry.shape) for name, entry in adapted.named_parameters() if entry.requires_grad}


def _without_numbers(directory: Path, source: str, trust_remote_code: bool) -> Any:
    """The model on torch's meta device, before anything packs or quantises it."""
    import torch

    with importing():
        from transformers import AutoModelForCausalLM

    config = _load_config(directory, source, trust_remote_code)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with importing(), torch.device("meta"):  # it imports the module of this kind of model
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def model_shape(directory: Path, source: str, *, trust_remote_code: bool) -> ModelShape | None:
    """The model's dimensions; None where its layers are none that we know how to count.

    Args:
        directory: The model's files on this node; its weights are not needed.
        source: What messages call the model.
        trust_remote_code: Whether code that lies beside them may run.

    Raises:
        ModelError: transformers cannot read the configuration.
    """
    text: Any = _load_config(directory, source, trust_remote_code).get_text_config()
    said = text.to_dict()  # without the defaults that attributes of other architectures would have
    layers, heads, intermediate = (
        getattr(text, name, None)
        for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    kinds = said.get("layer_types") or []
    if (
        not layers
        or not heads
        or not intermediate
        or said.get("kv_lora_rank")
        or not set(kinds) <= _MASKED_LAYERS
    ):
        return None
    experts = count_experts(text)
    window = said.get("sliding_window")
    return ModelShape(
        kind=text.model_type,
        layers=layers,
        hidden=text.hidden_size,
        intermediate=(said.get("moe_intermediate_size") or intermediate) if experts else intermediate,
        heads=heads,
        key_value_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds)
        if kinds
        else (window if said.get("use_sliding_window", True) else None,) * layers,
        caps_scores=bool(said.get("attn_logit_softcapping")),
        experts=experts,
        experts_per_token=said.get("num_experts_per_tok") or 0,
    )


def count_experts(text: Any) -> int:
    """Of each layer, by a model's text configuration; 0 where it is no mixture."""
    said = text.to_dict()  # without the defaults that attributes of other architectures would have
    return said.get("num_local_experts") or said.get("num_experts") or 0


def _load_config(directory: Path, source: str, trust_remote_code: bool):
    with importing():
        from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture checks its fields in its own way
        raise ModelError(
            f"model {source}: transformers cannot read its config.json ({first_line(error)}). Name a model that the installed "
            "transformers knows; one that needs code of its own also needs trust_remote_code: true."
        ) from error
