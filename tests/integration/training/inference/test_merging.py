"""Merged models compute what the base model with its adapter computes, for each kind of adapter, and round once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.adapter_uses import table
from tests.support.adapters import (
    KINDS,
    PREFIX,
    change_tensors,
    large_adapter,
    logits_of,
    make_models,
)
from tests.support.jobs import PROJECT
from tests.support.live_memory import LiveMemory
from tests.support.tiny_model import make_model
from training.inference.merging import merge_adapter
from training.models.torch_provider import attach_adapter, load_weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"), tiny_model)


def merged(model: Path, adapter: Path, dtype: Any, to: Path) -> Any:
    """Merge an adapter, save the model and return it as plain transformers loads it."""
    merge_adapter(load_weights(model, dtype=dtype), model, adapter).save_pretrained(to)
    return AutoModelForCausalLM.from_pretrained(to)


FAST = {"all linear layers", "tied, an adapter on the embedding", "fused experts (all-linear)"}


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_merged_model_computes_what_the_adapter_computes(models: dict[str, Path], tmp_path: Path, kind: str):
    name, lora = KINDS[kind]
    large_adapter(models[name], **lora).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    plain = logits_of(base)
    expected = logits_of(attach_adapter(base, tmp_path / "adapter"))
    assert (expected[..., : plain.shape[-1]] - plain).abs().max() > 0.1 * plain.abs().max(), (
        "the adapter changes the logits"
    )
    found = logits_of(merged(models[name], tmp_path / "adapter", "fp32", tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "stored", "lora"),
    [
        ("llama", torch.float32, {}),
        pytest.param("llama", torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param("llama", torch.float32, {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param("llama", torch.float32, {"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
        ("mixtral", torch.float32, {}),
        pytest.param("gpt2", torch.float32, {"fan_in_fan_out": True}, marks=pytest.mark.slow),
        ("biased", torch.float32, {"target_modules": ["q_proj"], "lora_bias": True}),
        pytest.param(
            "biased",
            torch.float32,
            {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"]},
            marks=pytest.mark.slow,
        ),
        pytest.param("biased", torch.float32, {"bias": "all"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bf16_export_is_the_fp32_merge_rounded_once(
    models: dict[str, Path], tmp_path: Path, name: str, stored: torch.dtype, lora: dict[str, Any]
):
    """Files store the experts of the Mixtral one by one, and transformers fuses them."""
    model = Path(shutil.copytree(models[name], tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for weight, value in base.named_parameters():
        if weight.endswith(".bias"):  # 0 in a new model
            value.data.normal_()
    base.to(stored).save_pretrained(model)
    large_adapter(model, **lora).save_pretrained(tmp_path / "adapter")
    exact = merged(model, tmp_path / "adapter", "fp32", tmp_path / "fp32").state_dict()
    rounded = merged(model, tmp_path / "adapter", "bf16", tmp_path / "bf16").state_dict()
    for weight, value in exact.items():
        assert torch.equal(rounded[weight], value.to(torch.bfloat16)), weight


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_bf16_export_takes_the_embedding_that_the_adapter_stores(
    models: dict[str, Path], tmp_path: Path, name: str
):
    """PEFT saves an embedding that has an adapter, and other tools may have trained it as well."""
    large_adapter(models[name], target_modules=["q_proj", "embed_tokens"]).save_pretrained(
        tmp_path / "adapter"
    )
    own = f"{PREFIX}model.embed_tokens.base_layer.weight"
    change_tensors(tmp_path / "adapter", lambda tensors: tensors | {own: tensors[own] * 2 + 0.1})
    exact = merged(models[name], tmp_path / "adapter", "fp32", tmp_path / "fp32").state_dict()
    rounded = merged(models[name], tmp_path / "adapter", "bf16", tmp_path / "bf16").state_dict()
    for weight, value in exact.items():
        assert torch.equal(rounded[weight], value.to(torch.bfloat16)), weight


def test_merge_reads_only_the_weight_file_that_transformers_loads(models: dict[str, Path], tmp_path: Path):
    """A stray file may be a Git LFS pointer, or have other weights under the same names."""
    large_adapter(models["llama"]).save_pretrained(tmp_path / "adapter")
    expected = merged(models["llama"], tmp_path / "adapter", "fp32", tmp_path / "plain").state_dict()
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    (model / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    other = {name: value + 1 for name, value in load_file(model / "model.safetensors").items()}
    for stray in ("a.safetensors", "z.safetensors"):
        save_file(other, model / stray)
    found = merged(model, tmp_path / "adapter", "fp32", tmp_path / "merged").state_dict()
    assert all(torch.equal(value, expected[weight]) for weight, value in found.items())


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


# --- The table of docs/adapters.md --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_documentation_lists_the_uses_of_each_kind_of_adapter(models: dict[str, Path]):
    """Rejected cells are errors of the plan. test_adapter, test_adapter_kinds, this file and test_vllm_exports test the others."""
    lines = "\n".join(table(models))
    assert lines in (PROJECT / "docs" / "adapters.md").read_text("utf-8"), lines
