"""The torch provider: attention, experts and dtypes of the models that it builds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import LoraConfig
from training.models import varlen_attention
from training.models.attention import Attention
from training.models.files import ModelError
from training.models.request import ModelRequest
from training.models.torch_provider import build, load_base, load_weights

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def request(directory: Path, **changes: object) -> ModelRequest:
    settings = {
        "directory": directory,
        "adapter_directory": None,
        "lora": None,
        "device": "cpu",
        "weights_dtype": "fp32",
        "zero_stage": 0,
        "load_in_4bit": False,
        "attention": Attention("sdpa", mask=False),
        "gradient_checkpointing": False,
        "context_length": 64,
        "seed": 0,
        "trust_remote_code": False,
        "deterministic": False,
    }
    return ModelRequest(**settings | changes)  # pyright: ignore[reportArgumentType]


def save_model(directory: Path, kind: str, **changes: object) -> Path:
    config = AutoConfig.for_model(kind, **SHAPE | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_loaded_models_apply_softcapping(tmp_path: Path):
    """SDPA would silently ignore softcapping."""
    settings = {"head_dim": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.5}
    capped = save_model(tmp_path, "gemma2", attn_logit_softcapping=0.1, **settings)
    tokens = torch.arange(16)[None]
    model: Any = load_weights(capped, dtype="fp32")
    logits = model(tokens).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(tokens).logits - logits).abs().max() > 0.1


def test_deterministic_experts_use_the_eager_implementation(tmp_path: Path):
    mixture = save_model(tmp_path, "mixtral", num_local_experts=2)
    assert load_base(request(mixture)).get_experts_implementation() != {"": "eager"}
    assert load_base(request(mixture, deterministic=True)).get_experts_implementation() == {"": "eager"}


def test_unquantized_parameters_and_hidden_states_are_bf16(tmp_path: Path):
    """In fp32, they and the hidden states would need twice the memory."""
    directory = save_model(tmp_path, "llama", hidden_size=64, intermediate_size=64)
    lora = LoraConfig(target_modules=["q_proj"])
    model = build(request(directory, weights_dtype="bf16", load_in_4bit=True, lora=lora))
    types = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert types == {torch.uint8, torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        states = model(torch.arange(16)[None], output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16}


def test_deterministic_does_not_change_models_without_experts(tmp_path: Path):
    directory = save_model(tmp_path, "llama")
    tokens = torch.arange(16)[None]
    plain, deterministic = (load_base(request(directory, deterministic=flag)) for flag in (False, True))
    assert torch.equal(plain(tokens).logits, deterministic(tokens).logits)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_packing_with_varlen_attention_needs_ampere(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    packed = request(save_model(tmp_path, "llama"), attention=Attention(varlen_attention.NAME, mask=False))
    if capability >= (8, 0):
        assert load_base(packed).config._attn_implementation == varlen_attention.NAME
        return
    with pytest.raises(ModelError, match=r"packing: .*Tesla T4.*packing: false"):
        load_base(packed)
