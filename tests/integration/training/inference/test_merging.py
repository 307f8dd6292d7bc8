"""Merged models compute what the base model with its adapter computes, for each kind of adapter, and round once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

from tests.support.adapters import large_adapter, logits_of, make_gpt2
from tests.support.live_memory import LiveMemory
from tests.support.tiny_model import make_model
from training.inference.merging import merge_adapter
from training.models.torch_provider import attach_adapter, load_weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_model,
        "tied": make_model(directory / "tied", tie_word_embeddings=True),
        "biased": make_model(directory / "biased", kind=Qwen2Config),
        "mixtral": make_model(directory / "mixtral", kind=MixtralConfig, num_local_experts=4),
        "gpt2": make_gpt2(directory / "gpt2"),
    }


def merged(model: Path, adapter: Path, dtype: Any, to: Path) -> Any:
    """Merge an adapter, save the model and return it as plain transformers loads it."""
    merge_adapter(load_weights(model, dtype=dtype), model, adapter).save_pretrained(to)
    return AutoModelForCausalLM.from_pretrained(to)


FAST = [
    ("llama", {}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("mixtral", {}),
]
SLOW = [
    ("llama", {"use_dora": True}),
    ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"trainable_token_indices": [1, 5]}),
    ("llama", {"target_modules": ["v_proj", "o_proj", "up_proj"], "layers_to_transform": [1]}),
    ("tied", {}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {"modules_to_save": ["embed_tokens"]}),
    ("tied", {"modules_to_save": ["lm_head"]}),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {"trainable_token_indices": [1, 5]}),
    ("tied", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [7]}}),
    ("biased", {"bias": "all"}),
    ("biased", {"bias": "lora_only"}),
    ("biased", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("gpt2", {"fan_in_fan_out": True}),
]


@pytest.mark.parametrize(
    ("name", "lora"), [*FAST, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)], ids=str
)
def test_merged_model_computes_what_the_adapter_computes(
    models: dict[str, Path], tmp_path: Path, name: str, lora: dict[str, Any]
):
    large_adapter(models[name], **lora).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    plain = logits_of(base)
    expected = logits_of(attach_adapter(base, tmp_path / "adapter"))
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max(), "the adapter changes the logits"
    found = logits_of(merged(models[name], tmp_path / "adapter", "fp32", tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("stored", "lora"),
    [
        (torch.float32, {}),
        pytest.param(torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bf16_export_is_the_fp32_merge_rounded_once(
    models: dict[str, Path], tmp_path: Path, stored: torch.dtype, lora: dict[str, Any]
):
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(stored).save_pretrained(model)
    large_adapter(model, **lora).save_pretrained(tmp_path / "adapter")
    exact = merged(model, tmp_path / "adapter", "fp32", tmp_path / "fp32").state_dict()
    rounded = merged(model, tmp_path / "adapter", "bf16", tmp_path / "bf16").state_dict()
    for name, value in exact.items():
        assert torch.equal(rounded[name], value.to(torch.bfloat16)), name


def test_merge_holds_one_copy_of_the_model_and_one_module_in_fp32(tmp_path: Path):
    model = make_model(tmp_path / "model", layers=24)
    large_adapter(model).save_pretrained(tmp_path / "adapter")
    peaks = {}
    for name in ("peft", "ours"):
        with LiveMemory([]) as memory:
            loaded = load_weights(model, dtype="bf16")
            if name == "peft":
                adapted: Any = attach_adapter(loaded, tmp_path / "adapter")
                adapted.merge_and_unload()
            else:
                merge_adapter(loaded, model, tmp_path / "adapter")
        peaks[name] = memory.peak
    assert peaks["ours"] <= 1.15 * peaks["peft"], peaks
