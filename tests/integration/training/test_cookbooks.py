"""The cookbooks that run on a machine without a GPU, in the order that their READMEs give, on a tiny model and rows like theirs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cookbooks.causal_lm.prepare import write_texts
from cookbooks.classification.prepare import TOPICS, write_topics
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems
from tests.support.jobs import PROJECT, run_main
from tests.support.tiny_model import make_model, write_data, write_pairs_of

CONTINUE = PROJECT / "cookbooks" / "continue_from_checkpoint"
RESUME = PROJECT / "cookbooks" / "resume_from_adapter"
PART_1, PART_2 = CONTINUE / "smollm2-135m-part-1.yaml", CONTINUE / "smollm2-135m-part-2.yaml"
STAGES = [RESUME / f"curriculum_stage_{number}.yaml" for number in (1, 2, 3)]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cookbooks")
    make_model(directory / "model")
    write_data(directory, train_rows=16, valid_rows=4)
    write_pairs_of(directory, train_rows=32, valid_rows=8)
    (directory / "texts.jsonl").write_text(write_texts(TRAIN_KINDS, 64, 1))
    (directory / "valid-texts.jsonl").write_text(write_texts(VALID_KINDS, 8, 2))
    (directory / "topics.jsonl").write_text(write_topics(48, 1))
    (directory / "valid-topics.jsonl").write_text(write_topics(12, 2))
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


def run(files: Path, yaml: Path, *, train: str, valid: str) -> dict[str, Any]:
    """A cookbook as it is, but for its model, its rows and where its run goes; its result."""
    finished = run_main(
        yaml,
        f"model_id={files / 'model'}",
        f"train_path={files / train}",
        f"valid_path={files / valid}",
        f"storage_path={files / 'runs'}",
        f"output_dir={files / 'scratch'}",
        "num_devices=1",
        "--json",
    )
    assert finished.exit_code == 0, finished.errors
    return finished.result


def ask(files: Path, yaml: Path) -> dict[str, Any]:
    """On questions and answers."""
    return run(files, yaml, train="questions.jsonl", valid="valid-questions.jsonl")


def chat(files: Path, yaml: Path) -> dict[str, Any]:
    """On chats."""
    return run(files, yaml, train="train.jsonl", valid="valid.jsonl")


@pytest.fixture(scope="module")
def part_1(files: Path) -> dict[str, Any]:
    return ask(files, PART_1)


def test_the_second_part(files: Path, part_1: dict[str, Any]):
    """It starts where the first was best."""
    part_2 = ask(files, PART_2)
    assert part_2["parent"] == part_1["best_checkpoint"]
    best = min(loss["eval_loss"] for loss in part_1["eval_losses"])
    assert part_2["eval_losses"][0]["eval_loss"] == pytest.approx(best, rel=0.01)


def test_more_epochs(files: Path, part_1: dict[str, Any]):
    """The state is taken whole: the first run's steps are counted."""
    extended = ask(files, RESUME / "extend.yaml")
    assert extended["parent"] == part_1["last_checkpoint"]
    assert extended["train_steps"] == part_1["train_steps"] * 4 / 3


def test_new_data(files: Path, part_1: dict[str, Any]):
    """Other rows, in another form, and steps from one."""
    other = chat(files, RESUME / "new_data.yaml")
    assert other["parent"] == part_1["best_checkpoint"]
    assert other["train_steps"] == 4


def test_a_4bit_base_below_the_adapter(files: Path, part_1: dict[str, Any]):
    """Quantising a base costs it little: the adapter still helps."""
    quantised = chat(files, RESUME / "qlora.yaml")
    assert quantised["parent"] == part_1["best_checkpoint"]
    assert quantised["train_steps"] == 100
    assert quantised["eval_losses"][-1]["eval_loss"] < quantised["eval_losses"][0]["eval_loss"]


def test_a_curriculum(files: Path):
    """Each stage starts from the best of the one before."""
    stages = [ask(files, stage) for stage in STAGES]
    assert [stage["parent"] for stage in stages] == [
        None,
        stages[0]["best_checkpoint"],
        stages[1]["best_checkpoint"],
    ]


def test_preference_tuning(files: Path):
    """It learns to tell the answers apart, from where it is its own reference."""
    yaml = PROJECT / "cookbooks" / "preference_tuning" / "smollm2-135m.yaml"
    first, *_, last = run(files, yaml, train="train-pairs.jsonl", valid="valid-pairs.jsonl")["eval_losses"]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["rewards/margins"] > 0


def test_causal_lm(files: Path):
    yaml = PROJECT / "cookbooks" / "causal_lm" / "smollm2-135m.yaml"
    result = run(files, yaml, train="texts.jsonl", valid="valid-texts.jsonl")
    assert result["eval_losses"][-1]["eval_loss"] < result["eval_losses"][0]["eval_loss"]
    assert result["trained_tokens"] == result["tokens"] - 64  # all but the first of each row


def test_classification(files: Path):
    """Labels that were no likelier than any other token become what the model writes."""
    yaml = PROJECT / "cookbooks" / "classification" / "smollm2-135m.yaml"
    result = run(files, yaml, train="topics.jsonl", valid="valid-topics.jsonl")
    first, *_, last = result["eval_losses"]
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["accuracy"] >= 1 / len(TOPICS)
    assert 0 < last["figures"]["f1"] <= 1
