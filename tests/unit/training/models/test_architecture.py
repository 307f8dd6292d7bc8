"""Models that are not causal or cannot be built, and models with code of their own: accepted, or rejected with the reason."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from training.models.architecture import (
    build_on_meta_device,
    check_custom_code,
    check_is_causal,
    check_tensors,
    load_config,
)
from training.models.files import ModelError, read_model_facts
from training.models.torch_provider import load_weights


def write_config(directory: Path, fields: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertModel"),
        ("roberta", "RobertaForMaskedLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_models_that_are_not_causal_raise_an_error_with_their_architecture(
    kind: str, architecture: str, tmp_path: Path
):
    write_config(tmp_path, {"model_type": kind, "architectures": [architecture]})
    with pytest.raises(ModelError, match=f"^model mine: .* causal .*{architecture}.*{kind}"):
        check_is_causal(tmp_path, "mine", trust_remote_code=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
        {"model_type": "gpt_neox"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
    ],
    ids=str,
)
def test_causal_models_are_accepted_and_their_encoder_variants_rejected(
    fields: dict[str, Any], tmp_path: Path
):
    write_config(tmp_path, fields)
    check_is_causal(tmp_path, "mine", trust_remote_code=False)
    write_config(
        tmp_path, fields | {"model_type": "bert", "is_decoder": False, "architectures": ["BertModel"]}
    )
    with pytest.raises(ModelError):
        check_is_causal(tmp_path, "mine", trust_remote_code=False)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"text_config": {"hidden_size": 5}},
            r"text_config is \{'hidden_size': 5\}, but llama has no such part",
        ),
        ({"text_config": []}, r"text_config is \[\], but llama"),
        ({"decoder": {"a": 1}}, r"decoder is \{'a': 1\}, but llama"),
        ({"generator": 5}, "generator is 5, but llama"),
        ({"output_attentions": True}, "output_attentions is True"),
        ({"return_dict": False}, "return_dict is False"),
        ({"fusion_config": {"a": 1}}, r"fusion_config is \{'a': 1\}"),
        ({"distributed_config": {}}, r"distributed_config is \{\}"),
    ],
    ids=str,
)
def test_settings_with_which_a_model_cannot_be_loaded_or_called_raise_an_error_with_the_key(
    settings: dict[str, Any], fault: str, tiny_model: Path, tmp_path: Path
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_config(model, json.loads((model / "config.json").read_text()) | settings)
    with pytest.raises((AttributeError, StrictDataclassError, ValueError)):
        loaded: Any = load_weights(model, dtype="fp32")
        loaded(torch.tensor([[5, 6]]))
        loaded.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match=rf"^model mine: config\.json: {fault}.* Remove .* in a copy"):
        load_config(model, "mine", trust_remote_code=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"text_config": None},
        {"output_attentions": None},
        {"return_dict": None},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_settings_without_effect_on_loading_are_accepted(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_config(model, json.loads((model / "config.json").read_text()) | settings)
    load_config(model, "mine", trust_remote_code=False)
    load_weights(model, dtype="fp32")(torch.tensor([[5, 6]]))
    assert read_model_facts(str(model)).max_context == 512


# --- Code of the model's own ----------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_LOADING = """
    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        return super().from_pretrained(*arguments, **settings)
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy code to a temporary directory, which it imports as one package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def own(tiny_model: Path, tmp_path: Path, modules: None) -> Path:
    """Return a Llama of a type that only its own code knows."""
    directory = Path(shutil.copytree(tiny_model, tmp_path / "own"))
    fields = json.loads((directory / "config.json").read_text())
    write_config(directory, fields | {"model_type": "own", "auto_map": AUTO_MAP})
    # transformers registers a model for its config, whose module has the name of its content.
    (directory / "configuration_own.py").write_text(f"# {tmp_path}\n{CONFIGURATION}")
    (directory / "modeling_own.py").write_text(MODELING)
    return directory


def remove_norm(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def tensors_of(model: Path) -> list[str]:
    """Check a model with its own code as the plan does, and return the tensors that it does not use."""
    check_custom_code(model, "mine", trust_remote_code=True)
    check_is_causal(model, "mine", trust_remote_code=True)
    base = build_on_meta_device(model, "mine", trust_remote_code=True)
    return check_tensors(base, read_model_facts(str(model)))


def test_own_code_is_built_and_its_tensors_are_compared(own: Path):
    assert tensors_of(own) == []
    remove_norm(own)
    with pytest.raises(ModelError, match=r"model\.norm\.weight, which is missing from model\.safetensors"):
        tensors_of(own)


def test_only_own_code_knows_the_tensors_that_it_loads_itself(own: Path):
    (own / "modeling_own.py").write_text(MODELING + OWN_LOADING)
    remove_norm(own)
    assert tensors_of(own) == []


def test_own_code_that_is_not_trusted_is_rejected(own: Path):
    with pytest.raises(
        ModelError, match=r"^model mine: .*type own;.*configuration_own\.OwnConfig.*trust_remote_code"
    ):
        check_custom_code(own, "mine", trust_remote_code=False)


@pytest.mark.parametrize("name", ["configuration_own", "modeling_own"])
def test_own_code_that_is_not_there_is_rejected(own: Path, name: str):
    (own / f"{name}.py").unlink()
    with pytest.raises(ModelError, match=rf"^model mine: .*{name}\.py is missing.*local directory"):
        check_custom_code(own, "mine", trust_remote_code=True)


def test_own_code_that_fails_is_an_error_with_its_first_line(own: Path):
    (own / "modeling_own.py").write_text(
        MODELING + "    def __init__(self, config):\n        raise OSError('no license')"
    )
    with pytest.raises(ModelError, match=r"^model mine: .*\(no license\)"):
        build_on_meta_device(own, "mine", trust_remote_code=True)


def test_code_of_transformers_is_used_if_own_code_is_not_trusted(tmp_path: Path):
    """Many models name code that transformers has had since."""
    write_config(tmp_path, {"model_type": "phi3", "auto_map": AUTO_MAP})
    check_custom_code(tmp_path, "mine", trust_remote_code=False)
    code_elsewhere = {name: f"org/code--{named}" for name, named in AUTO_MAP.items()}
    write_config(tmp_path, {"model_type": "own", "auto_map": code_elsewhere})
    check_custom_code(tmp_path, "mine", trust_remote_code=True)


def test_encoder_whose_own_code_is_not_trusted_is_rejected(tmp_path: Path):
    """transformers would load it as a decoder with bidirectional attention."""
    write_config(tmp_path, {"model_type": "bert", "architectures": ["BertModel"], "auto_map": AUTO_MAP})
    check_custom_code(tmp_path, "mine", trust_remote_code=False)
    with pytest.raises(ModelError, match="causal"):
        check_is_causal(tmp_path, "mine", trust_remote_code=False)


def test_config_whose_model_cannot_be_built_is_an_error(tmp_path: Path):
    write_config(tmp_path, {"model_type": "llama", "hidden_act": "nonesuch"})
    with pytest.raises(ModelError, match=re.compile(r"^model mine: .*config\.json.*nonesuch", re.DOTALL)):
        build_on_meta_device(tmp_path, "mine", trust_remote_code=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": 3}, r"hidden size \(64\) is not a multiple of .* heads \(3\)"),
        ({"num_attention_heads": "four"}, r"num_attention_heads|four"),
        ({"rope_parameters": None, "rope_scaling": {"type": "new", "factor": 2}}, r"rope_scaling\.type: new"),
    ],
    ids=str,
)
def test_config_with_an_invalid_value_raises_an_error_with_the_reason(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
):
    write_config(tmp_path, json.loads((tiny_model / "config.json").read_text()) | changes)
    with pytest.raises(ModelError, match=f"^model mine: .*{reason}") as error:
        build_on_meta_device(tmp_path, "mine", trust_remote_code=False)
    assert "trust_remote_code" not in str(error.value)
