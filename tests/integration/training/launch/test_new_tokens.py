"""Runs that add tokens to the vocabulary: an adapter that is exported and continued, one trained by DPO, and a sharded model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.front_door import run_command_quickly
from tests.support.grids import only_in_test_kernels
from tests.support.jobs import PROJECT, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, make_tokenizer, write_data, write_preference_pairs
from training.data.prompting import tokens_left_out

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


@only_in_test_kernels
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


@only_in_test_kernels
def test_tokens_trained_by_dpo_are_evaluated(settings: dict[str, Any], tmp_path: Path):
    """The reference is the model with the rows that the tokens start with, and evaluation answers as the merged model does."""
    files = Path(settings["model_id"]).parent
    pairs = write_preference_pairs(tmp_path, train_rows=24, valid_rows=5)
    for path in pairs:
        path.write_text(path.read_text().replace("#### ", "<result>"))
    dpo = settings | {
        "run_name": "dpo",
        "task": "preference_tuning",
        "train_path": str(pairs[0]),
        "valid_path": str(pairs[1]),
        "lora_config": {"r": 4},
        "learning_rate": 1e-3,
        "eval_first": True,
    }
    finished = run_main(write_yaml(tmp_path / "dpo.yaml", dpo), "--json")
    assert finished.exit_code == 0, finished.errors
    first, *_, last = finished.result["eval_losses"]
    assert first["figures"]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["figures"]["rewards/margins"] > 0

    run, valid = str(finished.result["run_uri"]), str(files / "valid.jsonl")
    asked = ("--data", valid, "--match", "text", "--max-new-tokens", "8", "--json")
    evaluated = run_main(Path("evaluate"), run, *asked)
    assert evaluated.exit_code == 0, evaluated.errors
    answers = [json.loads(line) for line in Path(evaluated.result["answers"]).read_text().splitlines()]
    assert len(answers) == 5
    assert all("<result>" in answer["expected"] for answer in answers)

    to = str(tmp_path / "merged-dpo")
    merged = run_main(Path("export"), finished.result["best_checkpoint"], "--to", to, "--dtype", "fp32")
    assert merged.exit_code == 0, merged.errors
    tokenizer: Any = AutoTokenizer.from_pretrained(to)
    model: Any = AutoModelForCausalLM.from_pretrained(to)
    left_out = tokens_left_out(tokenizer, [tokenizer.eos_token_id], settings["new_special_tokens"])
    assert RESULT not in left_out
    for answer in answers:
        tokens = tokenizer(answer["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        generated = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
        kept = [token for token in generated.tolist() if token not in left_out]
        assert answer["answer"] == tokenizer.decode(kept)


def test_special_tokens_of_a_run_are_part_of_its_answers_unless_they_end_them():
    tokenizer = make_tokenizer()
    known = set(tokenizer.all_special_ids)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<result>", "<end>"]})
    result, end = tokenizer.convert_tokens_to_ids(["<result>", "<end>"])
    assert tokens_left_out(tokenizer, [end], ["<result>", "<end>"]) == known | {end}
    assert tokens_left_out(tokenizer, [end], []) == known | {result, end}
