"""What transformers' models are told."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import LoraConfig
from training.models import varlen_attention
from training.models.request import ModelRequest
from training.models.torch_provider import _attention, build, load_base

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
        "dtype": "bf16",
        "weights_dtype": "fp32",
        "zero_stage": 0,
        "load_in_4bit": False,
        "flash_attention_2": False,
        "packing": True,
        "gradient_checkpointing": False,
        "context_length": 64,
        "seed": 0,
        "trust_remote_code": False,
        "deterministic": False,
    }
    return ModelRequest(**settings | changes)  # pyright: ignore[reportArgumentType]


def saved(directory: Path, kind: str, **changes: object) -> Path:
    config = AutoConfig.for_model(kind, **SHAPE | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_attention_softcapping_is_applied(tmp_path: Path):
    """As torch's own attention does, without a word."""
    settings = {"head_dim": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.5}
    capped = saved(tmp_path, "gemma2", attn_logit_softcapping=0.1, **settings)
    tokens = torch.arange(16)[None]
    model = load_base(request(capped, dtype="fp32", packing=False))
    logits = model(tokens).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(tokens).logits - logits).abs().max() > 0.1


def test_a_mixture_of_experts_computes_the_same_bits_every_time(tmp_path: Path):
    mixture = saved(tmp_path, "mixtral", num_local_experts=2)
    assert load_base(request(mixture)).get_experts_implementation() != {"": "eager"}
    assert load_base(request(mixture, deterministic=True)).get_experts_implementation() == {"": "eager"}


def test_parameters_that_are_not_quantized_are_bf16(tmp_path: Path):
    """And so does what a layer hands on to the next: in fp32 both would take twice the memory."""
    directory = saved(tmp_path, "llama", hidden_size=64, intermediate_size=64)
    lora = LoraConfig(target_modules=["q_proj"])
    model = build(request(directory, weights_dtype="bf16", load_in_4bit=True, lora=lora, packing=False))
    types = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert types == {torch.uint8, torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        states = model(torch.arange(16)[None], output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16}


def test_deterministic_does_not_change_models_without_experts(tmp_path: Path):
    directory = saved(tmp_path, "llama")
    tokens = torch.arange(16)[None]
    plain, deterministic = (load_base(request(directory, deterministic=flag)) for flag in (False, True))
    assert torch.equal(plain(tokens).logits, deterministic(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "model", "capability", "kind"),
    [
        ({}, {}, (9, 0), varlen_attention.NAME),
        ({}, {}, (8, 0), varlen_attention.NAME),
        ({}, {}, (7, 5), "sdpa"),
        ({"dtype": "fp32"}, {}, (9, 0), "sdpa"),
        ({"packing": False}, {}, (9, 0), "sdpa"),
        ({"device": "cpu"}, {}, (9, 0), "sdpa"),
        ({}, {"attention_dropout": 0.1}, (9, 0), "sdpa"),
        ({}, {"head_dim": 12}, (9, 0), "sdpa"),
        ({}, {"head_dim": 512}, (9, 0), "sdpa"),
    ],
)
def test_packed_rows_get_the_kernels_that_serve_them(
    changes: dict[str, object],
    model: dict[str, object],
    capability: tuple[int, int],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    AutoConfig.for_model("llama", **SHAPE | model).save_pretrained(tmp_path)
    assert _attention(request(tmp_path, **{"device": "cuda"} | changes)) == kind
