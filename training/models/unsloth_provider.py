"""Unsloth: the only module that imports it. `prepare` must run before transformers, trl and peft are imported.

Unsloth's files carry AGPL-3.0 headers; it is an optional package that this project neither ships nor copies.
"""

from typing import TYPE_CHECKING

import unsloth  # first: it patches what the imports below bring
from transformers import set_seed

from training.models import ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(request: ModelRequest) -> "PreTrainedModel":
    """The model of the request by Unsloth's loaders: its fused layers on a GPU, its CPU mode otherwise."""
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(request.adapter_directory or request.directory),
        max_seq_length=request.context_length,
        dtype=torch.bfloat16 if request.weights_dtype == "bf16" else torch.float32,
        load_in_4bit=request.load_in_4bit,
        full_finetuning=not request.is_lora,
        trust_remote_code=request.trust_remote_code,
        use_gradient_checkpointing=request.gradient_checkpointing,
    )
    if request.lora is None or request.adapter_directory is not None:
        return model
    set_seed(request.seed)
    lora = request.lora
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        target_modules=lora.target_modules,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        use_gradient_checkpointing=request.gradient_checkpointing,
        random_state=request.seed,
        max_seq_length=request.context_length,
    )
