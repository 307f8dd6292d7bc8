"""The torch provider: plain transformers and PEFT, the reference for the other providers."""

import warnings
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import peft
import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from configs.schema import LoraConfig
from training.models import sequence_parallel, varlen_attention
from training.models.architecture import check_complete
from training.models.attention import Implementation, plain_attention, rope_limit
from training.models.files import check_no_adapter
from training.models.generation import correct
from training.models.kernels import Device
from training.models.new_tokens import grow_vocabulary, rows_needed, start_rows, with_token_rows
from training.models.request import REFERENCE_ADAPTER, ModelRequest
from training.models.zero3_loading import experts_of_rank_0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# They drop the cache once a sequence is longer than `original_max_position_embeddings` (`prepare_inputs_for_generation`).
_WITHOUT_CACHE = ("phi3", "phimoe", "phi4_multimodal")


def build(request: ModelRequest) -> "PreTrainedModel":
    """Build the requested model with its adapter, on CPU or on this worker's GPU."""
    return with_adapter(load_base(request), request)


def load_base(request: ModelRequest) -> "PreTrainedModel":
    """Load the base model without an adapter; raise ModelError if its attention does not run on this worker's GPU."""
    if request.attention.implementation == varlen_attention.NAME:
        varlen_attention.check_gpu()
    reading = experts_of_rank_0() if request.zero_stage == 3 else nullcontext()
    with reading:
        model = load_weights(
            request.directory,
            dtype=request.weights_dtype,
            # ZeRO-3 partitions the weights while rank 0 loads them.
            device="cpu" if request.zero_stage == 3 else request.device,
            load_in_4bit=request.load_in_4bit,
            attention=request.attention.implementation
            if request.attention.sequence_parallel_size == 1
            else sequence_parallel.NAME,
            trust_remote_code=request.trust_remote_code,
        )
    model.config.use_cache = False
    if request.new_tokens is not None:
        start_rows(model, request.new_tokens)
    if request.deterministic and model._can_set_experts_implementation():
        # The other implementations count tokens with torch.histc, which is not deterministic on a GPU.
        model.set_experts_implementation("eager")
    return model


def load_weights(
    directory: Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"],
    device: Device = "cpu",
    load_in_4bit: bool = False,
    attention: Implementation | Literal["sequence_parallel"] | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a model in this dtype on a device.

    Weights are mapped from their files. On CPU, those that are stored in this dtype stay mapped, so the processes of a node share
    them; a GPU copies them tensor by tensor, so the host never holds the model.

    Without `attention`, the model gets `plain_attention`.

    Raises:
        ModelError: The weight files lack a parameter, or an adapter is stored beside them.
    """
    check_no_adapter(str(directory), [path.name for path in directory.iterdir()])
    arguments: dict[str, Any] = {}
    if attention is None:
        attention = plain_attention(
            AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
    if load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    if device == "cuda":
        arguments["device_map"] = {"": torch.cuda.current_device()}
    found: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        output_loading_info=True,
        dtype=DTYPES[dtype],
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **arguments,
    )
    model, loaded = found
    check_complete(
        model, str(directory), loaded["missing_keys"]
    )  # transformers has initialized them at random
    if model.generation_config is not None:
        correct(model.generation_config, model.config)
    for limit in _lengths_without_cache(model.config):
        _recompute_at(model, limit)
    reset_dynamic_rope(model)
    if load_in_4bit and device == "cpu":
        keep_4bit_layout(model)
    return model


def _lengths_without_cache(config: Any) -> set[int]:
    """Return the lengths after which RoPE changes, or transformers 5.17 drops the cache: for Phi, whatever its RoPE."""
    original = getattr(config, "original_max_position_embeddings", None)
    lengths = {rope_limit(config), original if config.model_type in _WITHOUT_CACHE else None}
    return {length for length in lengths if length is not None}


def _recompute_at(model: Any, limit: int) -> None:
    """Make `generate` recompute keys once a sequence gets longer than `limit`.

    Phi 3 drops the cache there, but transformers 5.17 passes only the last token on: from then on, a token depends on no earlier
    one (`prepare_inputs_for_generation` in models/phi3/modeling_phi3.py and generation/utils.py).
    """
    prepare = model.prepare_inputs_for_generation

    @wraps(prepare)  # generate reads the names of its arguments
    def prepare_all(input_ids: torch.Tensor, **others: Any) -> dict[str, Any]:
        cache = others.get("past_key_values")
        if cache is not None and cache.get_seq_length() <= limit < input_ids.shape[1]:
            positions = (others["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            others |= {"past_key_values": None, "next_sequence_length": None, "position_ids": positions}
        return prepare(input_ids, **others)

    model.prepare_inputs_for_generation = prepare_all


def reset_dynamic_rope(model: Any) -> None:
    """Make dynamic RoPE depend on the sequences of a batch alone; transformers 5.17 retains the frequencies of the longest so far."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_reset_frequencies)


def _reset_frequencies(rope: Any, _: Any) -> None:
    rope.inv_freq, rope.max_seq_len_cached = rope.original_inv_freq, rope.original_max_seq_len


def keep_4bit_layout(model: "PreTrainedModel") -> None:
    """Disable the AVX512-BF16 kernel of bitsandbytes.

    During evaluation it repacks the 4-bit weights, and later backward passes are wrong.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(model: "PreTrainedModel", request: ModelRequest) -> "PreTrainedModel":
    """Attach the continued or new adapter to the base model; return the base unchanged in full-parameter training."""
    if not request.is_lora:
        return model
    # PEFT's prepare_model_for_kbit_training is not used: it casts embeddings and norms, and so the activations, to fp32.
    autocast_adapter = _autocasts_adapter(request)
    if request.adapter_directory is not None:
        adapted: Any = attach_adapter(
            model, request.adapter_directory, is_trainable=True, autocast_adapter_dtype=autocast_adapter
        )
    else:
        assert request.lora is not None
        set_seed(request.seed)
        settings = peft_config(with_token_rows(request.lora, request.new_tokens))
        adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=autocast_adapter)  # pyright: ignore
    if adapted.peft_config["default"].trainable_token_indices is not None:
        prepare_token_rows(adapted)
    return adapted


def prepare_token_rows(adapted: Any) -> None:
    """Let the trainer save the trained rows of an embedding alone, and read the weight of a head that has trained rows."""
    # Otherwise PEFT saves a complete embedding that has more rows than that of the base model.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    head = adapted.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        vars(head)["bias"] = None  # TRL's fused head reads it, and PEFT's wrapper passes only the weight on


def attach_adapter(model: "PreTrainedModel", directory: Path, **arguments: Any) -> "PreTrainedModel":
    """Attach a stored adapter to its base model, whose embedding grows if the adapter has rows of tokens that were added.

    Args:
        model: The base model.
        directory: Local directory of the adapter.
        arguments: Passed to PEFT's `from_pretrained`.
    """
    settings = loaded_config(directory)
    grow_vocabulary(model, rows_needed(settings.trainable_token_indices))
    return peft.PeftModel.from_pretrained(model, directory, config=settings, **arguments)  # pyright: ignore


def loaded_config(directory: Path) -> peft.LoraConfig:
    """Read an adapter's config for loading its weights.

    The initialization is skipped: some would only be overwritten, and EVA needs data. A task type of another architecture would
    make PEFT pass other inputs to the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys that PEFT does not know; the plan has accounted for each
        settings = peft.LoraConfig.from_pretrained(str(directory))
    assert isinstance(settings, peft.LoraConfig)
    settings.init_lora_weights = True
    settings.eva_config = None
    settings.task_type = "CAUSAL_LM"
    return settings


def add_frozen_copy(model: "PreTrainedModel", request: ModelRequest) -> None:
    """Load the continued adapter a second time, frozen, as REFERENCE_ADAPTER."""
    assert isinstance(model, peft.PeftModel)
    assert request.adapter_directory is not None
    autocast_adapter = _autocasts_adapter(request)
    settings = loaded_config(request.adapter_directory)
    settings.inference_mode = True
    model.add_adapter(REFERENCE_ADAPTER, settings, autocast_adapter_dtype=autocast_adapter)
    model.load_adapter(
        str(request.adapter_directory),
        REFERENCE_ADAPTER,
        is_trainable=False,
        autocast_adapter_dtype=autocast_adapter,
    )


def _autocasts_adapter(request: ModelRequest) -> bool:
    # ZeRO-3 gathers parameters of one dtype at a time, so the adapter keeps the dtype of the base.
    return request.zero_stage != 3 or request.load_in_4bit


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """Convert the YAML's lora_config to PEFT's LoraConfig."""
    return peft.LoraConfig(**lora.model_dump())
