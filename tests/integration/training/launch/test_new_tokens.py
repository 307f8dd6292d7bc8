"""Runs that add tokens to the vocabulary: an adapter that is exported and continued, and a sharded model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.front_door import run_command_quickly
from tests.support.jobs import PROJECT, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data

pytestmark = pytest.mark.slow

WORK, RESULT = 512, 513


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tokens")
    make_model(directory / "model", tie_word_embeddings=True)
    for path in write_data(directory, train_rows=24, valid_rows=5):
        path.write_text(path.read_text().replace("#### ", "<result>"))
    return tiny_settings(directory) | {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "eval_first": False,
        "new_tokens": ["<work>"],
        "new_special_tokens": ["<result>"],
    }


def test_adapter_with_new_tokens_is_exported_and_continued(settings: dict[str, Any], tmp_path: Path):
    lora = settings | {"run_name": "lora", "lora_config": {"r": 4}, "num_devices": 2}
    finished = run_main(write_yaml(tmp_path / "lora.yaml", lora), "--json")
    assert finished.exit_code == 0, finished.errors
    checkpoint = Path(finished.result["best_checkpoint"])
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 40_000, "without the embedding"

    exported = run_command_quickly(
        ["export", str(checkpoint), "--to", str(tmp_path / "merged"), "--verify"], tmp_path / "export.txt"
    )
    assert exported.exit_code == 0, exported.errors
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(["<work>", "<result>"]) == [WORK, RESULT]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == len(tokenizer) == 514

    # The tokenizer of the adapter has the tokens.
    kept = {key: value for key, value in settings.items() if key not in ("new_tokens", "new_special_tokens")}
    more = kept | {"run_name": "more", "initial_adapter_model_ckpt_path": str(checkpoint), "eval_first": True}
    continued = run_main(write_yaml(tmp_path / "more.yaml", more), "--json")
    assert continued.exit_code == 0, continued.errors
    first, *_ = continued.result["eval_losses"]
    assert first["eval_loss"] == pytest.approx(finished.result["eval_losses"][-1]["eval_loss"], abs=1e-5)


def test_sharded_model_grows_by_new_tokens(settings: dict[str, Any], tmp_path: Path):
    zero_3 = json.loads((PROJECT / "configs/deepspeed/zero_3.json").read_text("utf-8"))
    zero_3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero_3.json").write_text(json.dumps(zero_3))
    sharded = settings | {
        "run_name": "sharded",
        "num_devices": 2,
        "deepspeed": {"config_path": str(tmp_path / "zero_3.json")},
    }
    finished = run_main(write_yaml(tmp_path / "sharded.yaml", sharded), "--json")
    assert finished.exit_code == 0, finished.errors
    model: Any = AutoModelForCausalLM.from_pretrained(finished.result["best_checkpoint"])
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 514
    assert model.lm_head.weight[WORK].abs().sum() > 0
