"""The questions of an evaluation are read and rendered as training reads and renders its rows."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runs.layout import DATA_REPORT_FILE
from tests.support.messages import assert_names
from tests.support.trained_runs import store_full_run
from training.data.errors import DataError
from training.inference.checkpoint_model import trained_model
from training.inference.evaluate import EvaluationSettings, Question, read_questions
from training.planning.endpoints import ClusterTarget
from utils.storage.bucket import open_store

ROW = {"prompt": "2 + 2?", "completion": "#### 4"}
PAIR = {"prompt": "2 + 2?", "chosen": "#### 4", "rejected": "#### 5"}
DATED = "Today is {{ strftime_now('%Y-%m-%d') }}.\n"
Read = Callable[..., list[Question]]


@pytest.fixture
def questions_of(tiny_model: Path, tmp_path: Path) -> Iterator[Read]:
    """Return a function that reads the questions of rows for a run with settings."""
    with ExitStack() as stack:

        def read(*rows: dict[str, Any], template: str = "", day: str = "", **settings: Any) -> list[Question]:
            storage = open_store(str(tmp_path / "runs"))
            run = store_full_run(storage, "run", tiny_model, output_dir=str(tmp_path / "scratch"), **settings)
            if day:
                report = {"train": {"date": day, "fingerprint": ""}, "valid": None}
                open_store(run).write(DATA_REPORT_FILE, json.dumps(report).encode())
            data = tmp_path / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            tokenizer = AutoTokenizer.from_pretrained(tiny_model)
            tokenizer.chat_template = template + tokenizer.chat_template
            trained = stack.enter_context(trained_model(run))
            columns = {str(ours): theirs for ours, theirs in trained.config.columns.items()}
            target = ClusterTarget(None)
            given = EvaluationSettings("number", columns, 1, "cpu", target, batch_size=1, max_new_tokens=8)
            return read_questions(str(data), trained, tokenizer, given)

        yield read


def test_a_question_has_the_date_of_the_training_rows(questions_of: Read):
    (question,) = questions_of(ROW, template=DATED, day="2026-01-02")
    assert question.prompt.startswith("Today is 2026-01-02.\n")


def test_ignored_columns_are_ignored(questions_of: Read):
    rated = {**ROW, "score": 0.2}
    (question,) = questions_of(rated, ignore_columns=["score"])
    assert question.expected == "#### 4"
    with pytest.raises(DataError, match=r"ignore_columns: \[score\]"):
        questions_of(rated)


@pytest.mark.parametrize("row", [ROW, {**ROW, "label": True}, {**ROW, "kto_tag": "true"}, PAIR])
def test_rows_of_preference_tuning_are_read_as_in_training(questions_of: Read, row: dict[str, Any]):
    loss = "dpo" if row is PAIR else "kto"
    settings = {"task": "preference_tuning", "preference_tuning_config": {"loss": loss}}
    (question,) = questions_of(row, **settings)
    assert question.expected == "#### 4"
    assert question.prompt.endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")


def test_an_error_has_counts_and_the_chat_template(questions_of: Read, tiny_model: Path):
    """Equal errors are one line with a count."""
    rendered = {**ROW, "prompt": "<|im_start|>user\n2 + 2?<|im_end|>\n"}
    with pytest.raises(DataError) as caught:
        questions_of(*[rendered] * 3, ROW, *[{"prompt": "2 + 2?", "completion": "four"}] * 2)
    assert_names(
        str(caught.value),
        *("5 of 6 rows cannot be evaluated (3 rendered already, 2 no number)", "rows.jsonl:1: "),
        *("(and 2 more rows)", "rows.jsonl:5: ", "(and 1 more rows)", f"the model {tiny_model}"),
    )


def test_a_bad_answer_is_not_expected(questions_of: Read):
    settings = {"task": "preference_tuning", "preference_tuning_config": {"loss": "kto"}}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has a label that says that its answer is bad"):
        questions_of({**ROW, "label": False}, **settings)
