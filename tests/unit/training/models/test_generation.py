"""Generation settings that transformers loads but does not save: removed if `generate` ignores them, else an error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from training.models.files import ModelError
from training.models.generation import Corrections, check_generation, check_savable
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
    assert check_savable(tiny_model, "tiny", trust_remote_code=False) == Corrections()
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **UNUSED)
    assert set(check_savable(directory, "tiny", trust_remote_code=False).ignored) == {
        "temperature (needs do_sample)",
        "top_p (needs do_sample)",
        "min_p (needs do_sample)",
        "length_penalty (needs num_beams)",
    }


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"early_stopping": True}, "early_stopping (needs num_beams)"),
        ({"output_scores": True}, "output_scores (needs return_dict_in_generate)"),
        ({"output_attentions": True}, "output_attentions (needs return_dict_in_generate)"),
        ({"pad_token_id": -1}, "pad_token_id (invalid)"),
        ({"use_cache": False, "cache_implementation": "static"}, "cache_implementation (needs use_cache)"),
    ],
    ids=str,
)
def test_the_setting_that_an_ignored_one_needs_is_reported(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], ignored: str
):
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections((ignored,))
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")


def test_sampling_settings_are_kept(tiny_model: Path, tmp_path: Path):
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **sampling)
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections()
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
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections(
        ("temperature (needs do_sample)",)
    )
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "is_sampled"),
    [
        ({"temperature": 0}, False),
        ({"temperature": -1.0, "top_p": 0.9}, False),
        ({"top_p": 0.0}, False),
        ({"top_p": 1.5}, True),
        ({"top_k": -1}, True),
        ({"min_p": 2.0}, True),
        ({"typical_p": 0.0}, True),
        ({"repetition_penalty": 0}, True),
        ({"repetition_penalty": -2.0, "do_sample": False}, False),
        ({"num_beams": 0}, True),
        ({"num_beams": 2.5}, True),
        ({"no_repeat_ngram_size": 2.5}, True),
        ({"bad_words_ids": []}, True),
        ({"bad_words_ids": [[99999]]}, True),
        ({"forced_eos_token_id": 99999}, True),
        ({"forced_bos_token_id": 512}, True),
        ({"suppress_tokens": list(range(512))}, True),
        ({"sequence_bias": {}}, True),
        ({"min_length": 2.5}, True),
        ({"exponential_decay_length_penalty": [1]}, True),
        ({"guidance_scale": "x"}, True),
        ({"max_time": "x"}, True),
        ({"dola_layers": "low", "do_sample": False}, False),
        ({"num_return_sequences": 2.5}, True),
        ({"is_assistant": True, "num_beams": 3, "no_repeat_ngram_size": 2}, True),
    ],
    ids=str,
)
def test_values_that_generate_rejects_are_removed_and_reported(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], is_sampled: bool
):
    directory = with_settings(
        tiny_model, tmp_path / "model", "generation_config.json", **{"do_sample": True} | settings
    )
    name, value = next(iter(settings.items()))
    assert check_savable(directory, "tiny", trust_remote_code=False).rejected == (f"{name}: {value}",)
    model: Any = load_weights(directory, dtype="fp32")
    model.save_pretrained(tmp_path / "saved")
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    saved.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    assert saved.generation_config.do_sample is is_sampled


def test_a_setting_whose_need_is_rejected_is_ignored(tiny_model: Path, tmp_path: Path):
    settings = {"num_beams": 0, "early_stopping": True}
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections(
        ("early_stopping (needs num_beams)",), ("num_beams: 0",)
    )
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")


def test_settings_that_generate_accepts_are_kept(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = {
        **{"num_beams": 4, "num_return_sequences": 4, "min_length": 40, "forced_eos_token_id": 2},
        **{"stop_strings": ["a"], "token_healing": True, "cache_implementation": "offloaded"},
    }
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    before = torch.random.get_rng_state()
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not caplog.records
    load_weights(directory, dtype="fp32").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in settings} == settings


def test_integers_that_generate_rejects_become_floats(tiny_model: Path, tmp_path: Path):
    settings = {"do_sample": True, "temperature": 2, "repetition_penalty": 2}
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings)
    assert check_savable(directory, "tiny", trust_remote_code=False) == Corrections()
    model: Any = load_weights(directory, dtype="fp32")
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"a":', "not valid JSON"),
        ("[]", "contains list"),
        ('{"max_new_tokens": "ten"}', "max_new_tokens is 'ten', but must be a number"),
        ('{"temperature": [0.6]}', r"temperature is \[0.6\], but must be a number"),
        ('{"eos_token_id": 99999}', "eos_token_id has the value 99999, but the model has 512 tokens"),
        ('{"eos_token_id": [2, 512]}', "eos_token_id has the value 512"),
        ('{"pad_token_id": 512}', "pad_token_id has the value 512"),
        ('{"eos_token_id": []}', r"eos_token_id has the value \[\]"),
        ('{"bos_token_id": "<s>"}', "bos_token_id has the value '<s>'"),
        (
            '{"eos_token_id": -1}',
            r"eos_token_id has the value -1, but the model has 512 tokens \(ids 0 to 511\)",
        ),
        ('{"eos_token_id": [2, -1]}', "eos_token_id has the value -1"),
        ('{"do_sample": "yes"}', "do_sample is 'yes', but must be true or false"),
        ('{"min_length": 100, "max_length": 50}', "min_length is 100, but max_length is 50"),
        ('{"min_new_tokens": 9, "max_new_tokens": 8}', "min_new_tokens is 9, but max_new_tokens is 8"),
    ],
)
def test_faulty_generation_config_raises_an_error_with_file_and_key(
    tiny_model: Path, tmp_path: Path, content: str, fault: str
):
    directory = with_settings(tiny_model, tmp_path / "model", "generation_config.json")
    check_generation(directory, "tiny", 512)
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"^model tiny: generation_config\.json: {fault}"):
        check_generation(directory, "tiny", 512)


def test_settings_that_transformers_resets_or_ignores_are_accepted(tiny_model: Path, tmp_path: Path):
    settings = {"pad_token_id": -1, "do_sample": None, "min_length": 9, "max_length": 8, "max_new_tokens": 20}
    check_generation(
        with_settings(tiny_model, tmp_path / "model", "generation_config.json", **settings), "tiny", 512
    )


def test_token_ids_of_old_models_in_config_json_are_checked(tiny_model: Path, tmp_path: Path):
    directory = with_settings(tiny_model, tmp_path / "model", "config.json", eos_token_id=512)
    (directory / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"^model tiny: config\.json: eos_token_id has the value 512"):
        check_generation(directory, "tiny", 512)
