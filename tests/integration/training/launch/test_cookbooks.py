"""The cookbooks that run on a machine without a GPU, in the order that their READMEs give, on a tiny model and rows like theirs.

`make test` runs the two that show most, `make test-cookbooks` all of them (ALL_COOKBOOKS=1).
"""

import gzip
import json
import math
import os
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
from runs.listing import list_runs
from tests.support.jobs import PROJECT, environment, run_main
from tests.support.tiny_model import make_model, make_tokenizer, write_data, write_pairs_of

COOKBOOKS = PROJECT / "cookbooks"
CONTINUE, RESUME = COOKBOOKS / "continue_from_checkpoint", COOKBOOKS / "resume_from_adapter"
PART_1, PART_2 = CONTINUE / "smollm2-135m-part-1.yaml", CONTINUE / "smollm2-135m-part-2.yaml"
STAGES = [RESUME / f"curriculum_stage_{number}.yaml" for number in (1, 2, 3)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
not_in_the_sample = pytest.mark.skipif(
    not os.environ.get("ALL_COOKBOOKS"), reason="`make test-cookbooks` runs it"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cookbooks")
    make_model(directory / "model")
    write_data(directory, train_rows=16, valid_rows=4)
    write_pairs_of(directory, train_rows=32, valid_rows=8)
    _write_questions(directory / "questions.jsonl", write_problems(TRAIN_KINDS, 16, 1))
    _write_questions(directory / "valid-questions.jsonl", write_problems(VALID_KINDS, 4, 1))
    return directory


def _write_questions(path: Path, chats: str) -> None:
    """Rows in GSM8K's columns."""
    rows = [json.loads(line)["messages"] for line in chats.splitlines()]
    path.write_text(
        "".join(
            json.dumps({"question": question["content"], "answer": answer["content"]}) + "\n"
            for question, answer in rows
        )
    )


def overrides(files: Path, *, model: str | Path, train: str, valid: str) -> list[str]:
    """What makes a cookbook a small run of its own."""
    return [
        f"model_id={model}",
        f"train_path={files / train}",
        f"valid_path={files / valid}",
        f"storage_path={files / 'runs'}",
        f"output_dir={files / 'scratch'}",
        "num_devices=1",
    ]


def run(
    files: Path, yaml: Path, *more: str, train: str, valid: str, model: str | Path | None = None
) -> dict[str, Any]:
    """A cookbook as it is, but for its model, its rows and where its run goes; its result."""
    settings = overrides(files, model=model or files / "model", train=train, valid=valid)
    finished = run_main(yaml, *settings, *more, "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


def ask(files: Path, yaml: Path) -> dict[str, Any]:
    """On questions and answers."""
    return run(files, yaml, train="questions.jsonl", valid="valid-questions.jsonl")


def chat(files: Path, yaml: Path, *more: str, model: str | Path | None = None) -> dict[str, Any]:
    """On chats."""
    return run(files, yaml, *more, train="train.jsonl", valid="valid.jsonl", model=model)


def assert_learned(result: dict[str, Any]) -> None:
    """The last evaluation is better than the one before any step."""
    assert result["eval_losses"][-1]["eval_loss"] < result["eval_losses"][0]["eval_loss"]


@pytest.fixture(scope="module")
def part_1(files: Path) -> dict[str, Any]:
    return ask(files, PART_1)


def test_the_second_part(files: Path, part_1: dict[str, Any]):
    """It starts where the first was best."""
    part_2 = ask(files, PART_2)
    assert part_2["parent"] == part_1["best_checkpoint"]
    best = min(loss["eval_loss"] for loss in part_1["eval_losses"])
    assert part_2["eval_losses"][0]["eval_loss"] == pytest.approx(best, rel=0.01)


def test_function_calling(files: Path):
    """Calls and answers are learned, by the template of the YAML: the model's own writes no tools."""
    (files / "calls.jsonl").write_text(write_calls(["Oslo", "Kyoto"], 24, 1))
    (files / "valid-calls.jsonl").write_text(write_calls(["Lima"], 6, 2))
    model = make_model(files / "model-of-long-rows", positions=4096)
    yaml = COOKBOOKS / "function_calling" / "smollm2-135m.yaml"
    result = run(files, yaml, train="calls.jsonl", valid="valid-calls.jsonl", model=model)
    assert_learned(result)
    example, *_ = json.loads((Path(result["run_uri"]) / "data_report.json").read_text())["train"]["examples"]
    trained = "".join(text for text, is_trained in example if is_trained)
    assert trained.startswith('<tool_call>{"name": "')
    assert trained.count("<|im_end|>") == 2


@not_in_the_sample
def test_more_epochs(files: Path, part_1: dict[str, Any]):
    """The state is taken whole: the first run's steps are counted."""
    extended = ask(files, RESUME / "extend.yaml")
    assert extended["parent"] == part_1["last_checkpoint"]
    assert extended["train_steps"] == part_1["train_steps"] * 4 / 3


@not_in_the_sample
def test_new_data(files: Path, part_1: dict[str, Any]):
    """Other rows, in another form, and steps from one."""
    other = chat(files, RESUME / "new_data.yaml")
    assert other["parent"] == part_1["best_checkpoint"]
    assert other["train_steps"] == 4


@not_in_the_sample
def test_a_4bit_base_below_the_adapter(files: Path, part_1: dict[str, Any]):
    """Quantising a base costs it little: the adapter still helps."""
    quantised = chat(files, RESUME / "qlora.yaml")
    assert quantised["parent"] == part_1["best_checkpoint"]
    assert quantised["train_steps"] == 100
    assert_learned(quantised)


@not_in_the_sample
def test_a_curriculum(files: Path):
    """Each stage starts from the best of the one before."""
    stages = [ask(files, stage) for stage in STAGES]
    assert [stage["parent"] for stage in stages] == [
        None,
        stages[0]["best_checkpoint"],
        stages[1]["best_checkpoint"],
    ]


@not_in_the_sample
def test_preference_tuning(files: Path):
    """It learns to tell the answers apart, from where it is its own reference."""
    yaml = COOKBOOKS / "preference_tuning" / "smollm2-135m.yaml"
    first, *_, last = run(files, yaml, train="train-pairs.jsonl", valid="valid-pairs.jsonl")["eval_losses"]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["rewards/margins"] > 0


@not_in_the_sample
def test_causal_lm(files: Path):
    (files / "texts.jsonl").write_text(write_texts(TRAIN_KINDS, 64, 1))
    (files / "valid-texts.jsonl").write_text(write_texts(VALID_KINDS, 8, 2))
    result = run(
        files, COOKBOOKS / "causal_lm" / "smollm2-135m.yaml", train="texts.jsonl", valid="valid-texts.jsonl"
    )
    assert_learned(result)
    assert result["trained_tokens"] == result["tokens"] - 64  # all but the first of each row


@not_in_the_sample
def test_classification(files: Path):
    """Labels that were no likelier than any other token become what the model writes."""
    (files / "topics.jsonl").write_text(write_topics(48, 1))
    (files / "valid-topics.jsonl").write_text(write_topics(12, 2))
    yaml = COOKBOOKS / "classification" / "smollm2-135m.yaml"
    result = run(files, yaml, train="topics.jsonl", valid="valid-topics.jsonl")
    assert_learned(result)
    figures = result["eval_losses"][-1]["figures"]
    assert figures["accuracy"] >= 1 / len(TOPICS)
    assert 0 < figures["f1"] <= 1


@not_in_the_sample
def test_data_of_ones_own(files: Path):
    """Two formats are mixed as they are weighted, and the two mistakes are left out and listed."""
    (files / "own.csv").write_text(own_data.write_mistakes(own_data.write_table(TRAIN_KINDS, 16, 1)))
    (files / "chats").mkdir()
    (files / "chats" / "a.jsonl.gz").write_bytes(
        gzip.compress(own_data.write_chats(TRAIN_KINDS, 8, 3).encode())
    )
    (files / "valid.csv").write_text(own_data.write_table(VALID_KINDS, 4, 2))
    sources = f"[{{path: {files}/own.csv, weight: 2}}, {{path: '{files}/chats/*.jsonl.gz', weight: 1}}]"
    yaml = COOKBOOKS / "bring_your_own_data" / "smollm2-135m.yaml"
    result = run(files, yaml, f"train_path={sources}", train="unused", valid="valid.csv")
    assert_learned(result)
    skipped = (Path(result["run_uri"]) / "skipped_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].split()[0] for line in skipped] == ["`Reply`", "`Question`"]


@not_in_the_sample
def test_weights_of_ones_own(files: Path, bucket_uri: str):
    """Layers are gone, and what is left is uploaded, loaded and trained."""
    own_weights.prune(make_model(files / "deep", layers=20))
    own_weights.upload(files / "deep", f"{bucket_uri}/own")
    assert json.loads((files / "deep" / "config.json").read_text())["num_hidden_layers"] == 18
    yaml = COOKBOOKS / "bring_your_own_weights" / "smollm2-135m.yaml"
    assert_learned(chat(files, yaml, "learning_rate=1e-2", model=f"{bucket_uri}/own"))


@not_in_the_sample
def test_another_family_of_models(files: Path):
    """Without a chat template of its own; the YAML's goes with the checkpoint."""
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
    result = chat(files, COOKBOOKS / "bring_any_hf_model" / "gpt-neox-14m.yaml", model=files / "neox")
    assert_learned(result)
    assert "<|im_start|>" in (Path(result["best_checkpoint"]) / "chat_template.jinja").read_text()


@not_in_the_sample
@pytest.mark.parametrize("method", ["lora", "full"])
def test_lora_and_full_parameter(method: str, files: Path):
    yaml = COOKBOOKS / "lora_vs_full_parameter" / f"smollm2-135m-{method}.yaml"
    assert_learned(chat(files, yaml, "learning_rate=1e-2"))


@not_in_the_sample
def test_long_context(files: Path):
    (files / "notes.jsonl").write_text(write_notes(8, 1, notes=6))
    (files / "valid-notes.jsonl").write_text(write_notes(2, 2, notes=6))
    yaml = COOKBOOKS / "long_context" / "smollm2-135m.yaml"
    model = make_model(files / "model-of-notes", positions=2048)
    settings = ("learning_rate=1e-2",)
    assert_learned(run(files, yaml, *settings, train="notes.jsonl", valid="valid-notes.jsonl", model=model))


@not_in_the_sample
def test_optimize_cost(files: Path):
    """The batch is chosen: on a tiny model all that a step takes."""
    result = chat(files, COOKBOOKS / "optimize_cost" / "smollm2-135m.yaml", "num_epochs=10")
    assert_learned(result)
    config = (Path(result["run_uri"]) / "config.yaml").read_text()
    assert "train_batch_size_per_device: 4" in config


@not_in_the_sample
def test_a_search(files: Path):
    """Each trial is a run that main.py lists; the best is shown first."""
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
    best = min(runs, key=lambda found: found.best_eval_loss or math.inf)
    assert f"best: {best.run_uri}" in done.stdout
