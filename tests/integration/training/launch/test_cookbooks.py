"""Cookbooks that need no GPU run on a tiny model and similar rows, in the order of their READMEs.

`make test-all` runs two of them, `make test-cookbooks` runs all (ALL_COOKBOOKS=1).
"""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cookbooks.bring_your_own_data import prepare as own_data
from cookbooks.bring_your_own_weights import prepare as own_weights
from cookbooks.causal_lm.prepare import write_texts
from cookbooks.classification.prepare import TOPICS, write_topics
from cookbooks.function_calling.prepare import write_calls
from cookbooks.long_context.prepare import write_notes
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems
from runs.summaries import list_runs
from tests.support.grids import only_in_test_cookbooks
from tests.support.jobs import PROJECT, environment, run_main
from tests.support.tiny_model import make_model, make_tokenizer, write_data, write_preference_pairs

COOKBOOKS = PROJECT / "cookbooks"
CONTINUE, RESUME = COOKBOOKS / "continue_from_checkpoint", COOKBOOKS / "resume_from_adapter"
PART_1, PART_2 = CONTINUE / "smollm2-135m-part-1.yaml", CONTINUE / "smollm2-135m-part-2.yaml"
STAGES = [RESUME / f"curriculum_stage_{number}.yaml" for number in (1, 2, 3)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cookbooks")
    make_model(directory / "model")
    write_data(directory, train_rows=16, valid_rows=4)
    write_preference_pairs(directory, train_rows=32, valid_rows=8)
    _write_questions(directory / "questions.jsonl", write_problems(TRAIN_KINDS, 16, 1))
    _write_questions(directory / "valid-questions.jsonl", write_problems(VALID_KINDS, 4, 1))
    return directory


def _write_questions(path: Path, chats: str) -> None:
    """Write chats as rows with GSM8K's columns."""
    rows = [json.loads(line)["messages"] for line in chats.splitlines()]
    path.write_text(
        "".join(
            json.dumps({"question": question["content"], "answer": answer["content"]}) + "\n"
            for question, answer in rows
        )
    )


def overrides(files: Path, *, model: str | Path, train: str, valid: str) -> list[str]:
    """Return overrides that make a cookbook a small run with its own storage."""
    return [
        f"model_id={model}",
        f"train_path={files / train}",
        f"valid_path={files / valid}",
        f"storage_path={files / 'runs'}",
        f"output_dir={files / 'scratch'}",
        "num_devices=1",
    ]


def run_cookbook(
    files: Path, yaml: Path, *more: str, train: str, valid: str, model: str | Path | None = None
) -> dict[str, Any]:
    """Run a cookbook with another model, other rows and other storage, and return its result."""
    settings = overrides(files, model=model or files / "model", train=train, valid=valid)
    finished = run_main(yaml, *settings, *more, "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


def run_on_questions(files: Path, yaml: Path) -> dict[str, Any]:
    """Run a cookbook on questions and answers."""
    return run_cookbook(files, yaml, train="questions.jsonl", valid="valid-questions.jsonl")


def run_on_chats(files: Path, yaml: Path, *more: str, model: str | Path | None = None) -> dict[str, Any]:
    """Run a cookbook on chats."""
    return run_cookbook(files, yaml, *more, train="train.jsonl", valid="valid.jsonl", model=model)


def assert_learned(result: dict[str, Any]) -> None:
    """Assert that the last eval loss is below the one before the first step."""
    assert result["eval_losses"][-1]["eval_loss"] < result["eval_losses"][0]["eval_loss"]


@pytest.fixture(scope="module")
def part_1(files: Path) -> dict[str, Any]:
    return run_on_questions(files, PART_1)


def test_part_2_starts_from_the_best_checkpoint_of_part_1(files: Path, part_1: dict[str, Any]):
    part_2 = run_on_questions(files, PART_2)
    assert part_2["parent"] == part_1["best_checkpoint"]
    best = min(loss["eval_loss"] for loss in part_1["eval_losses"])
    assert part_2["eval_losses"][0]["eval_loss"] == pytest.approx(best, rel=0.01)


def test_function_calling_learns_calls_and_answers(files: Path):
    """The chat template comes from the YAML, because the model's own template renders no tools."""
    (files / "calls.jsonl").write_text(write_calls(["Oslo", "Kyoto"], 24, 1))
    (files / "valid-calls.jsonl").write_text(write_calls(["Lima"], 6, 2))
    model = make_model(files / "model-of-long-rows", positions=4096)
    yaml = COOKBOOKS / "function_calling" / "smollm2-135m.yaml"
    result = run_cookbook(files, yaml, train="calls.jsonl", valid="valid-calls.jsonl", model=model)
    assert_learned(result)
    example, *_ = json.loads((Path(result["run_uri"]) / "data_report.json").read_text())["train"]["examples"]
    loss_text = "".join(text for text, is_trained in example if is_trained)
    assert loss_text.startswith('<tool_call>{"name": "')
    assert loss_text.count("<|im_end|>") == 2


@only_in_test_cookbooks
def test_extended_run_counts_the_steps_of_the_first_run(files: Path, part_1: dict[str, Any]):
    extended = run_on_questions(files, RESUME / "extend.yaml")
    assert extended["parent"] == part_1["last_checkpoint"]
    assert extended["train_steps"] == part_1["train_steps"] * 4 / 3


@only_in_test_cookbooks
def test_new_data_starts_from_the_best_checkpoint_at_step_0(files: Path, part_1: dict[str, Any]):
    """The new rows also have another format."""
    result = run_on_chats(files, RESUME / "new_data.yaml")
    assert result["parent"] == part_1["best_checkpoint"]
    assert result["train_steps"] == 4


@only_in_test_cookbooks
def test_qlora_improves_the_adapter_on_a_4bit_base(files: Path, part_1: dict[str, Any]):
    result = run_on_chats(files, RESUME / "qlora.yaml")
    assert result["parent"] == part_1["best_checkpoint"]
    assert result["train_steps"] == 100
    assert_learned(result)


@only_in_test_cookbooks
def test_each_curriculum_stage_starts_from_the_best_checkpoint_before(files: Path):
    stages = [run_on_questions(files, stage) for stage in STAGES]
    assert [stage["parent"] for stage in stages] == [
        None,
        stages[0]["best_checkpoint"],
        stages[1]["best_checkpoint"],
    ]


@only_in_test_cookbooks
def test_preference_tuning_raises_the_reward_margin(files: Path):
    """The first eval loss is log 2, because the model is its own reference before the first step."""
    yaml = COOKBOOKS / "preference_tuning" / "smollm2-135m.yaml"
    first, *_, last = run_cookbook(files, yaml, train="train-pairs.jsonl", valid="valid-pairs.jsonl")[
        "eval_losses"
    ]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["rewards/margins"] > 0


@only_in_test_cookbooks
def test_causal_lm_counts_all_tokens_but_the_first_as_loss_tokens(files: Path):
    (files / "texts.jsonl").write_text(write_texts(TRAIN_KINDS, 64, 1))
    (files / "valid-texts.jsonl").write_text(write_texts(VALID_KINDS, 8, 2))
    result = run_cookbook(
        files, COOKBOOKS / "causal_lm" / "smollm2-135m.yaml", train="texts.jsonl", valid="valid-texts.jsonl"
    )
    assert_learned(result)
    assert result["trained_tokens"] == result["tokens"] - 64  # no loss on the first token of a row


@only_in_test_cookbooks
def test_classification_reports_accuracy_and_f1(files: Path):
    """A random model ranks labels no higher than other tokens, so even chance accuracy shows that it learned them."""
    (files / "topics.jsonl").write_text(write_topics(48, 1))
    (files / "valid-topics.jsonl").write_text(write_topics(12, 2))
    yaml = COOKBOOKS / "classification" / "smollm2-135m.yaml"
    result = run_cookbook(files, yaml, train="topics.jsonl", valid="valid-topics.jsonl")
    assert_learned(result)
    figures = result["eval_losses"][-1]["figures"]
    assert figures["accuracy"] >= 1 / len(TOPICS)
    assert 0 < figures["f1"] <= 1


@only_in_test_cookbooks
def test_bring_your_own_data_trains_on_mixed_formats_and_lists_skipped_rows(files: Path):
    (files / "own.csv").write_text(own_data.write_mistakes(own_data.write_table(TRAIN_KINDS, 16, 1)))
    (files / "chats").mkdir()
    (files / "chats" / "a.jsonl.gz").write_bytes(
        gzip.compress(own_data.write_chats(TRAIN_KINDS, 8, 3).encode())
    )
    (files / "valid.csv").write_text(own_data.write_table(VALID_KINDS, 4, 2))
    sources = f"[{{path: {files}/own.csv, weight: 2}}, {{path: '{files}/chats/*.jsonl.gz', weight: 1}}]"
    yaml = COOKBOOKS / "bring_your_own_data" / "smollm2-135m.yaml"
    result = run_cookbook(files, yaml, f"train_path={sources}", train="unused", valid="valid.csv")
    assert_learned(result)
    skipped = (Path(result["run_uri"]) / "skipped_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].split()[0] for line in skipped] == ["`Reply`", "`Question`"]


@only_in_test_cookbooks
def test_bring_your_own_weights_trains_a_pruned_model_from_a_bucket(files: Path, bucket_uri: str):
    own_weights.prune(make_model(files / "deep", layers=20))
    own_weights.upload(files / "deep", f"{bucket_uri}/own")
    assert json.loads((files / "deep" / "config.json").read_text())["num_hidden_layers"] == 18
    yaml = COOKBOOKS / "bring_your_own_weights" / "smollm2-135m.yaml"
    assert_learned(run_on_chats(files, yaml, "learning_rate=1e-2", model=f"{bucket_uri}/own"))


@only_in_test_cookbooks
def test_gpt_neox_stores_the_chat_template_of_the_yaml(files: Path):
    """The model has no chat template of its own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    GPTNeoXForCausalLM(config).save_pretrained(files / "neox")
    tokenizer.save_pretrained(files / "neox")
    result = run_on_chats(files, COOKBOOKS / "bring_any_hf_model" / "gpt-neox-14m.yaml", model=files / "neox")
    assert_learned(result)
    assert "<|im_start|>" in (Path(result["best_checkpoint"]) / "chat_template.jinja").read_text()


@only_in_test_cookbooks
@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_parameter_lower_the_eval_loss(method: str, files: Path):
    yaml = COOKBOOKS / "lora_vs_full_parameter" / f"smollm2-135m-{method}.yaml"
    assert_learned(run_on_chats(files, yaml, "learning_rate=1e-2"))


@only_in_test_cookbooks
def test_long_context_lowers_the_eval_loss(files: Path):
    (files / "notes.jsonl").write_text(write_notes(8, 1, notes=6))
    (files / "valid-notes.jsonl").write_text(write_notes(2, 2, notes=6))
    yaml = COOKBOOKS / "long_context" / "smollm2-135m.yaml"
    model = make_model(files / "model-of-notes", positions=2048)
    settings = ("learning_rate=1e-2",)
    assert_learned(
        run_cookbook(files, yaml, *settings, train="notes.jsonl", valid="valid-notes.jsonl", model=model)
    )


@only_in_test_cookbooks
def test_optimize_cost_chooses_the_largest_batch_that_fits(files: Path):
    """For a tiny model, that is the complete batch of a step."""
    result = run_on_chats(files, COOKBOOKS / "optimize_cost" / "smollm2-135m.yaml", "num_epochs=10")
    assert_learned(result)
    config = (Path(result["run_uri"]) / "config.yaml").read_text()
    assert "train_batch_size_per_device: 4" in config


@only_in_test_cookbooks
def test_search_stores_a_run_per_trial_and_prints_the_best(files: Path):
    directory = COOKBOOKS / "modifying_hyperparameters"
    settings = overrides(files, model=files / "model", train="train.jsonl", valid="valid.jsonl")
    settings[3] = f"storage_path={files / 'searched'}"
    done = subprocess.run(
        [
            sys.executable,
            str(directory / "search.py"),
            str(directory / "smollm2-135m.yaml"),
            *settings,
            "--trials=3",
        ],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list_runs(str(files / "searched"))
    assert len(runs) == 3
    best = min(runs, key=lambda run: run.best_eval_loss or math.inf)
    assert f"best: {best.run_uri}" in done.stdout
