"""Generation settings that transformers loads but does not save: removed if `generate` ignores them, else an error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from training.models.files import ModelError
from training.models.generation import check_savable
from training.models.torch_provider import load_weights

UNUSED = {"temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0, "min_p": 0.1}


def with_settings(model: Path, copy: Path, name: str, **settings: Any) -> Path:
    """Return a copy of a model with other keys in one of its files."""
    shutil.copytree(model, copy)
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content | settings))
    return copy


def test_model_with_ignored_settings_is_saved_and_generates_the_same(tiny_model: Path, tmp_path: Path):
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **UNUSED)
    original = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="do_sample"):
        original.save_pretrained(tmp_path / "rejected")
    model: Any = load_weights(directory, dtype="fp32")
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.tensor([[5, 6, 7]])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    answer = original.generate(tokens, max_new_tokens=8)
    assert torch.equal(saved.generate(tokens, max_new_tokens=8), answer)


def test_ignored_settings_are_reported(tiny_model: Path, tmp_path: Path):
    assert check_savable(tiny_model, "tiny", trust_remote_code=False) == []
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **UNUSED)
    assert set(check_savable(directory, "tiny", trust_remote_code=False)) == UNUSED.keys()


def test_sampling_settings_are_kept(tiny_model: Path, tmp_path: Path):
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **sampling)
    assert check_savable(directory, "tiny", trust_remote_code=False) == []
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").to_dict().items() >= sampling.items()


@pytest.mark.parametrize("settings", [{"num_return_sequences": 3}, {"early_stopping": "maybe"}], ids=str)
def test_invalid_settings_raise_an_error_with_the_file(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
):
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    with pytest.raises(ModelError, match=rf"tiny: generation_config\.json .*{next(iter(settings))}"):
        check_savable(directory, "tiny", trust_remote_code=False)


def test_settings_of_old_models_in_config_json_are_reported(tiny_model: Path, tmp_path: Path):
    directory = with_settings(tiny_model, tmp_path / "model", "config.json", temperature=0.6)
    (directory / "generation_config.json").unlink()
    assert check_savable(directory, "tiny", trust_remote_code=False) == ["temperature"]
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")
