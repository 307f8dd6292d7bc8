"""Comparison of a base model's weight files with the parameters that its config.json requires."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from tests.support.adapters import make_gpt2, meta_model
from tests.support.tiny_model import make_model
from training.models.architecture import check_tensors
from training.models.files import ModelError, check_dtypes, read_model_facts
from training.models.torch_provider import load_weights

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_model,
        "tied": make_model(directory / "tied", tie_word_embeddings=True),
        "mixtral": make_model(directory / "mixtral", kind=MixtralConfig, num_local_experts=4),
        "gpt2": make_gpt2(directory / "gpt2"),
    }


def changed(model: Path, copy: Path, change: Callable[[Tensors], Tensors], **settings: object) -> Path:
    """Copy a model with other tensors and settings of its config.json; return the copy."""
    shutil.copytree(model, copy)
    save_file(change(load_file(model / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | settings))
    return copy


def unused(model: Path) -> list[str]:
    return check_tensors(meta_model(model), read_model_facts(str(model)))


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def shortened(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: value[:100].contiguous() if re.search(pattern, name) else value
        for name, value in tensors.items()
    }


def renamed(prefix: str, **more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()} | more


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", unchanged),
        ("tied", unchanged),
        ("mixtral", unchanged),
        ("gpt2", unchanged),
        ("llama", renamed("model.")),
        ("gpt2", renamed("transformer.", **{"h.0.attn.bias": torch.ones(1, 1, 64, 64)})),
        ("llama", renamed("", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    ],
)
def test_models_that_transformers_loads_completely_are_accepted(
    kind: str, change: Callable[[Tensors], Tensors], models: dict[str, Path], tmp_path: Path
):
    model = changed(models[kind], tmp_path / "model", change)
    assert unused(model) == []
    load_weights(model, dtype="fp32")


@pytest.mark.parametrize(
    ("kind", "change", "settings", "pattern"),
    [
        ("llama", without(UP), {}, rf"{re.escape(UP)}, which is missing from FILE"),
        ("llama", without("lm_head"), {}, r"lm_head\.weight, which is missing from FILE\."),
        ("llama", unchanged, {"num_hidden_layers": 3}, r"model\.layers\.2\..* FILE \(8 more\)"),
        (
            "llama",
            shortened(re.escape(UP)),
            {},
            rf"{re.escape(UP)} in .*\[128, 64\], but FILE has \[100, 64\]",
        ),
        ("llama", unchanged, {"vocab_size": 600}, r"\[600, 64\], but FILE has \[512, 64\] \(1 more\)"),
        (
            "mixtral",
            without(r"layers\.1\..*experts"),
            {},
            r"model\.layers\.1\.mlp\.experts\..* missing from FILE",
        ),
        ("mixtral", without(r"layers\.1\..*experts\.3\."), {}, r"layers\.1\..*\[4, .*FILE has \[3, "),
        ("mixtral", without(r"layers\.1\..*experts\.3\.w1"), {}, r"model\.layers\.1\..* FILE lacks a tensor"),
    ],
)
def test_incomplete_models_raise_an_error_with_the_tensor_in_the_plan_and_on_loading(
    kind: str,
    change: Callable[[Tensors], Tensors],
    settings: dict[str, object],
    pattern: str,
    models: dict[str, Path],
    tmp_path: Path,
):
    model = changed(models[kind], tmp_path / "model", change, **settings)
    named = pattern.replace("FILE", r"model\.safetensors")
    with pytest.raises(ModelError, match=rf"{tmp_path}/model: config\.json requires .*{named}.*config\.json"):
        unused(model)
    # transformers itself rejects other shapes.
    with pytest.raises((ModelError, RuntimeError), match=r"missing|ignore_mismatched_sizes|conversion"):
        load_weights(model, dtype="bf16")


def test_shard_with_another_shape_is_named(models: dict[str, Path], tmp_path: Path):
    model = shutil.copytree(models["llama"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(models["llama"]).save_pretrained(model, max_shard_size="200KB")
    shard = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][UP]
    save_file(shortened(re.escape(UP))(load_file(shard)), shard, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{re.escape(UP)} in .*, but {shard.name} has \[100, 64\]"):
        unused(model)
    save_file(without(re.escape(UP))(load_file(shard)), shard, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{re.escape(UP)}, which is missing from its \*\.safetensors"):
        unused(model)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (unchanged, None),
        (without(re.escape(UP)), rf"{re.escape(UP)}, which is missing"),
        (without("input_layernorm"), r"input_layernorm\.weight, which is missing"),
        (shortened(rf"{re.escape(UP)}$"), rf"{re.escape(UP)} in .*\[128, 64\], but .* has \[100, 1\]"),
    ],
)
def test_4_bit_models_are_compared_with_config_json(
    change: Callable[[Tensors], Tensors], pattern: str | None, models: dict[str, Path], tmp_path: Path
):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(models["llama"], quantization_config=quantization)
    directory = shutil.copytree(models["llama"], tmp_path / "4bit")
    loaded.save_pretrained(directory)
    model = changed(directory, tmp_path / "model", change)
    if pattern is None:
        assert unused(model) == []
        return
    with pytest.raises(ModelError, match=pattern):
        unused(model)


def test_tensors_that_the_model_does_not_use_are_returned(models: dict[str, Path], tmp_path: Path):
    model = changed(models["llama"], tmp_path / "model", unchanged, num_hidden_layers=1)
    names = unused(model)
    assert len(names) == 9
    assert all(name.startswith("model.layers.1.") for name in names)


def test_the_comparison_prints_nothing(
    models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    model = changed(models["mixtral"], tmp_path / "model", without(r"experts\.3\.w1"))
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError):
        unused(model)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "int8"), (torch.float8_e4m3fn, "float8_e4m3")])
def test_weights_that_are_quantized_without_a_config_raise_an_error(
    models: dict[str, Path], tmp_path: Path, dtype: torch.dtype, name: str
):
    quantized = changed(
        models["llama"], tmp_path / "model", lambda tensors: tensors | {UP: tensors[UP].to(dtype)}
    )
    message = rf"model\.safetensors: the tensor {UP} is stored as {name}, but weights must be bf16"
    with pytest.raises(ModelError, match=message):
        check_dtypes(read_model_facts(str(quantized)), meta_model(quantized).shapes, ())


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_integer_buffers_of_older_files_are_accepted(models: dict[str, Path], tmp_path: Path, kind: str):
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    older = changed(models[kind], tmp_path / "model", lambda tensors: tensors | mask)
    check_dtypes(read_model_facts(str(older)), meta_model(older).shapes, ())
