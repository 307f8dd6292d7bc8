"""The config.json of an exported model, as transformers 5 and earlier readers take it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
)

from training.inference.export import write_earlier_rope_keys

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def written(config: PreTrainedConfig, directory: Path) -> dict[str, Any]:
    """Return the content of config.json, after checking that transformers reads the same from it."""
    config.save_pretrained(directory)
    before = AutoConfig.from_pretrained(directory).to_dict()
    write_earlier_rope_keys(directory / "config.json")
    after = AutoConfig.from_pretrained(directory).to_dict()
    after["rope_parameters"].pop("type", None)  # the same as rope_type
    assert {key: after[key] for key in before} == before
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("scaling", [None, LLAMA_3])
def test_base_and_scaling_are_also_stored_under_the_keys_of_transformers_4(
    scaling: dict[str, Any] | None, tmp_path: Path
):
    parameters = {"rope_theta": 500_000.0} | (scaling or {"rope_type": "default"})
    settings = written(LlamaConfig(rope_parameters=parameters), tmp_path)
    assert settings["rope_parameters"] == parameters
    assert settings["rope_theta"] == 500_000.0
    assert settings["rope_scaling"] == scaling


def test_partial_rotary_factor_is_also_stored_at_the_top(tmp_path: Path):
    assert written(PhiConfig(partial_rotary_factor=0.25), tmp_path)["partial_rotary_factor"] == 0.25


def test_gpt_neox_also_has_its_own_names_of_base_and_rotated_part(tmp_path: Path):
    """Transformers 4 reads only these."""
    parameters = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    settings = written(GPTNeoXConfig(rope_parameters=parameters), tmp_path)
    assert (settings["rotary_pct"], settings["rotary_emb_base"]) == (0.5, 5000.0)


def test_parameters_per_kind_of_layer_are_left_alone(tmp_path: Path):
    assert "rope_scaling" not in written(Gemma3TextConfig(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Phi3Config, set()),
        (PhimoeConfig, {"short_mscale", "long_mscale", "original_max_position_embeddings"}),
    ],
    ids=["phi3", "phimoe"],
)
def test_longrope_of_phi_has_the_keys_that_transformers_4_requires(kind: Any, more: set[str], tmp_path: Path):
    """It raises an error for other keys (`_rope_scaling_validation` in configuration_phi3.py of 4.57)."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    mscale = {"short_mscale": 1.1, "long_mscale": 1.2} if more else {}
    rope = {"rope_type": "longrope", "rope_theta": 5000.0} | factors | mscale
    config = kind(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters=rope,
    )
    settings = written(config, tmp_path)
    assert settings["rope_scaling"].keys() == {"type", "short_factor", "long_factor"} | more
    assert (settings["rope_theta"], settings["original_max_position_embeddings"]) == (5000.0, 32)
