"""Adapters with large random weights for tiny models, and changes to their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2Config

from tests.support.tiny_model import make_model, make_tokenizer
from training.models.architecture import MetaModel, build_on_meta_device
from training.models.new_tokens import grow_vocabulary, rows_needed
from training.models.torch_provider import prepare_token_rows

Tensors = dict[str, torch.Tensor]
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {}),
    "init_lora_weights: gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "init_lora_weights: orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "init_lora_weights: false": ("llama", {"init_lora_weights": False}),
    "init_lora_weights: eva": ("llama", {"init_lora_weights": "eva"}),
    "use_dora": ("llama", {"use_dora": True}),
    "use_rslora, rank_pattern, alpha_pattern": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "layers_to_transform": (
        "llama",
        {"target_modules": ["v_proj", "o_proj", "up_proj"], "layers_to_transform": [1]},
    ),
    "exclude_modules": ("llama", {"exclude_modules": ["q_proj"]}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [1, 5]}),
    "an adapter on the embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embeddings": ("tied", {}),
    "tied, an adapter on the embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, modules_to_save: [embed_tokens]": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied, modules_to_save: [lm_head]": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied, modules_to_save with ensure_weight_tying": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied, trainable_token_indices": ("tied", {"trainable_token_indices": [1, 5]}),
    "tied, other trainable_token_indices for each end": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [7]}},
    ),
    "new tokens": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [512, 513], "lm_head": [512, 513]}},
    ),
    "tied, new tokens": ("tied", {"trainable_token_indices": [512, 513]}),
    "bias: all": ("biased", {"bias": "all"}),
    "bias: lora_only": ("biased", {"bias": "lora_only"}),
    "lora_bias": ("biased", {"target_modules": ["q_proj"], "lora_bias": True}),
    "fused experts (all-linear)": ("mixtral", {}),
    "target_parameters": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "fan_in_fan_out (GPT-2)": ("gpt2", {"fan_in_fan_out": True}),
}
"""Feature -> (model of `make_models`, settings of the adapter)."""

REJECTED_STARTS = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")
"""Values of init_lora_weights that no run trains."""


def make_models(directory: Path, tiny_model: Path) -> dict[str, Path]:
    """Write a tiny model of each architecture that KINDS names; return their directories."""
    return {
        "llama": tiny_model,
        "tied": make_model(directory / "tied", tie_word_embeddings=True),
        "biased": make_model(directory / "biased", kind=Qwen2Config),
        "mixtral": make_model(directory / "mixtral", kind=MixtralConfig, num_local_experts=4),
        "gpt2": make_gpt2(directory / "gpt2"),
    }


def meta_model(directory: Path) -> MetaModel:
    """Return a model without weights, as the plan builds it."""
    return build_on_meta_device(directory, str(directory), trust_remote_code=False)


def large_adapter(model: Path, **lora: Any) -> Any:
    """Return a model with a PEFT adapter whose trainable weights all differ from their initial values by much."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    grow_vocabulary(base, rows_needed(lora.get("trainable_token_indices")))
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
    if "trainable_token_indices" in lora:
        prepare_token_rows(adapted)
    enlarge(adapted)
    return adapted.eval()


def enlarge(adapted: Any) -> None:
    """Add large random values to all trainable parameters, with a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    for _name, parameter in sorted(adapted.named_parameters(), key=lambda entry: entry[0]):
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def write_adapter(directory: Path, model: Path, **lora: Any) -> Path:
    """Write an adapter for the model with large weights to a directory; return the directory."""
    adapted = large_adapter(model, **lora)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(directory)
    return directory


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite an adapter's tensors."""
    save_file(change(load_file(directory / FILE)), directory / FILE)


def change_config(directory: Path, **changes: Any) -> None:
    """Change keys of an adapter's config."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(model: Any) -> torch.Tensor:
    """Return the model's logits for fixed random tokens and the last token of its vocabulary, (2, 24, vocabulary)."""
    tokens = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3))
    tokens[:, -1] = model.config.get_text_config().vocab_size - 1
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.float()


def make_gpt2(directory: Path) -> Path:
    """Save a tiny GPT-2, whose Conv1D layers store (inputs, outputs), and its tokenizer; return the directory."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
