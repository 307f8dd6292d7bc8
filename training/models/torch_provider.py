"""Stock transformers and PEFT: works everywhere, and is what the other providers are compared with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from transformers.utils.import_utils import is_flash_attn_2_available

from configs.schema import LoraConfig
from training.models import varlen_attention
from training.models.kernels import Device
from training.models.request import REFERENCE_ADAPTER, ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(request: ModelRequest) -> "PreTrainedModel":
    """The model of the request, on CPU or on this worker's GPU."""
    return with_adapter(load_base(request), request)


def load_base(request: ModelRequest) -> "PreTrainedModel":
    """The base model alone."""
    model = load_weights(
        request.directory,
        dtype=request.weights_dtype,
        device=request.device,
        load_in_4bit=request.load_in_4bit,
        attention=_attention(request),
        trust_remote_code=request.trust_remote_code,
    )
    model.config.use_cache = False
    if request.deterministic and model._can_set_experts_implementation():
        model.set_experts_implementation(
            "eager"
        )  # the others count tokens by torch.histc, which is not, on a GPU
    return model


def load_weights(
    directory: Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"],
    device: Device = "cpu",
    load_in_4bit: bool = False,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """A model as its files say, in a dtype of our choice; on CPU, but for 4-bit weights. `attention` is its kind, as transformers calls it;
    where torch's own would leave out what caps a model's scores (Gemma 2), it is transformers' plain one."""
    arguments: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if attention == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        attention = "eager"
    if load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_DTYPES[dtype],
        )
    # A quantised model cannot be moved after loading; ZeRO-3 splits the weights while they are loaded.
    if load_in_4bit and device == "cuda":
        arguments["device_map"] = {"": torch.cuda.current_device()}
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=_DTYPES[dtype],
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **arguments,
    )
    if load_in_4bit and device == "cpu":
        keep_4bit_layout(model)
    return model


def _attention(request: ModelRequest) -> str:
    """The kind that serves the request best, as transformers calls it."""
    if request.flash_attention_2 and is_flash_attn_2_available():
        return "flash_attention_2"
    if request.packing and request.device == "cuda":
        config = AutoConfig.from_pretrained(request.directory, trust_remote_code=request.trust_remote_code)
        if varlen_attention.serves(config, _DTYPES[request.dtype]):
            return varlen_attention.NAME
    return "sdpa"


def keep_4bit_layout(model: "PreTrainedModel") -> None:
    """Without this an evaluation on AVX512-BF16 repacks the 4-bit weights, and later backward passes are wrong."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(model: "PreTrainedModel", request: ModelRequest) -> "PreTrainedModel":
    """The base with the continued or the new adapter on it; the base itself in full-parameter training."""
    if not request.is_lora:
        return model
    # Without PEFT's prepare_model_for_kbit_training: it would turn the embedding and the norms, and with them what each layer hands
    # on, to fp32.
    autocast_adapter = _autocasts_adapter(request)
    if request.adapter_directory is not None:
        return peft.PeftModel.from_pretrained(
            model, request.adapter_directory, is_trainable=True, autocast_adapter_dtype=autocast_adapter
        )  # pyright: ignore[reportReturnType]
    assert request.lora is not None
    set_seed(request.seed)
    return peft.get_peft_model(model, peft_config(request.lora), autocast_adapter_dtype=autocast_adapter)  # pyright: ignore


def add_frozen_copy(model: "PreTrainedModel", request: ModelRequest) -> None:
    """The continued adapter once more, as REFERENCE_ADAPTER."""
    assert isinstance(model, peft.PeftModel)
    model.load_adapter(
        str(request.adapter_directory),
        REFERENCE_ADAPTER,
        is_trainable=False,
        autocast_adapter_dtype=_autocasts_adapter(request),
    )


def _autocasts_adapter(request: ModelRequest) -> bool:
    # ZeRO-3 gathers parameters of one dtype at a time, so there the adapter keeps the base's.
    return request.zero_stage != 3 or request.load_in_4bit


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """Our section as PEFT's own configuration."""
    return peft.LoraConfig(**lora.model_dump())
