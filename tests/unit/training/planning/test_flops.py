"""FLOPs of a row, compared with the count of torch's FlopCounterMode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from training.models.architecture import ModelShape, model_shape
from training.planning.flops import pairs_in_view, row_flops

TOKENS = 48
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(**TINY, tie_word_embeddings=False)
TIED = LlamaConfig(**TINY, tie_word_embeddings=True)
WIDE_HEADS = Qwen3Config(**TINY, head_dim=32)
MIXTURE = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
WINDOWS = Gemma3TextConfig(
    **TINY,
    head_dim=32,
    sliding_window=16,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
)


def shape_of(config: PreTrainedConfig, directory: Path) -> ModelShape:
    config.save_pretrained(directory)
    shape = model_shape(directory, "tiny", trust_remote_code=False)
    assert shape is not None
    return shape


def build(config: PreTrainedConfig) -> Any:
    # FlopCounterMode sees the matmuls of eager experts.
    experts = {"experts_implementation": "eager"} if config is MIXTURE else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **experts)


def counted_by_torch(model: Any) -> int:
    tokens = torch.randint(0, 128, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops()


def excluded_flops(shape: ModelShape, flops: Any, rotary_embeddings: int = 1) -> float:
    """Return the FLOPs that only torch counts: masked pairs, and the angles of the rotary embedding, once per model."""
    masked = sum(
        per_pair * (TOKENS**2 - pairs_in_view(TOKENS, window)) for window, per_pair in flops.attention
    )
    return masked + rotary_embeddings * TOKENS * shape.head_dim


@pytest.mark.parametrize(
    ("config", "rotary_embeddings"), [(LLAMA, 1), (TIED, 1), (WIDE_HEADS, 1), (MIXTURE, 1), (WINDOWS, 2)]
)
def test_full_parameter_flops_equal_torchs_count(
    config: PreTrainedConfig, rotary_embeddings: int, tmp_path: Path
):
    shape, model = shape_of(config, tmp_path), build(config)
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    flops = row_flops(shape, names, is_trained=lambda name: True, ranks={})
    estimated = flops.of_row(TOKENS, TOKENS) + excluded_flops(shape, flops, rotary_embeddings)
    assert estimated == counted_by_torch(model)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda name: "embed_tokens" in name,
        lambda name: "layers.2" not in name and "norm" not in name.split(".")[1],
        lambda name: "lm_head" not in name,
    ],
    ids=["embedding", "all but the last layer", "all but the head"],
)
def test_layers_before_the_first_trained_parameter_count_only_forward_flops(
    frozen: Callable[[str], bool], tmp_path: Path
):
    shape, model = shape_of(LLAMA, tmp_path), build(LLAMA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    flops = row_flops(shape, names, is_trained=lambda name: not frozen(name), ranks={})
    assert flops.of_row(TOKENS, TOKENS) + excluded_flops(shape, flops) == counted_by_torch(model)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["o_proj"], "layers_to_transform": [2]},
    ],
    ids=lambda adapter: str(adapter["target_modules"]),
)
def test_lora_flops_equal_torchs_count(adapter: dict[str, Any], tmp_path: Path):
    shape, base = shape_of(LLAMA, tmp_path), build(LLAMA)
    names = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **adapter))
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): parameter.shape[0]
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }
    flops = row_flops(shape, names, is_trained=lambda name: False, ranks=ranks)
    assert flops.of_row(TOKENS, TOKENS) + excluded_flops(shape, flops) == counted_by_torch(model)


def test_lm_head_flops_count_only_loss_tokens(tmp_path: Path):
    shape = shape_of(LLAMA, tmp_path)
    names = {name: tuple(parameter.shape) for name, parameter in build(LLAMA).named_parameters()}
    flops = row_flops(shape, names, is_trained=lambda name: True, ranks={})
    assert flops.of_row(10, 10) - flops.of_row(10, 4) == 6 * 6 * 128 * 64


@pytest.mark.parametrize(
    ("tokens", "window", "pairs"), [(1, None, 1), (4, None, 10), (4, 4, 10), (4, 9, 10), (4, 2, 7), (4, 1, 4)]
)
def test_pairs_in_view_are_causal_pairs_within_the_window(tokens: int, window: int | None, pairs: int):
    assert pairs_in_view(tokens, window) == pairs


def test_unsupported_architecture_has_no_shape(tmp_path: Path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    assert model_shape(tmp_path, "tiny", trust_remote_code=False) is None
