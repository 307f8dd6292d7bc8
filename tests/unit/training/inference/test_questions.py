"""The questions of an evaluation are read and rendered as training reads and renders its rows."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from runs.layout import DATA_REPORT_FILE
from tests.support.messages import assert_names
from tests.support.prepared import prepare, request
from tests.support.tiny_model import make_tokenizer
from tests.support.trained_runs import store_full_run
from training.data.answer_marks import AnswerMarks, find_marks
from training.data.errors import DataError
from training.data.prompting import tokens_left_out
from training.data.renderer import Renderer
from training.inference.checkpoint_model import trained_model
from training.inference.evaluate import (
    EvaluationSettings,
    Match,
    Question,
    read_questions,
    score,
)
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

        def read(
            *rows: dict[str, Any], template: str = "", day: str = "", match: Match = "number", **settings: Any
        ) -> list[Question]:
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
            given = EvaluationSettings(match, columns, 1, "cpu", target, batch_size=1, max_new_tokens=8)
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


KTO = {"task": "preference_tuning", "preference_tuning_config": {"loss": "kto"}}


def test_a_label_that_is_no_rating_is_not_read_by_preference_tuning(questions_of: Read):
    (question,) = questions_of({**ROW, "label": "algebra"}, **KTO)
    assert question.expected == "#### 4"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("match", "content", "is_pair"), [("text", "", False), ("number", "#### 4", False), ("text", "", True)]
)
def test_an_answer_with_a_call_is_rejected(questions_of: Read, match: Match, content: str, is_pair: bool):
    user = {"role": "user", "content": "2 + 2?"}
    calling = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    answer = {"role": "assistant", "content": "#### 5"}
    row = (
        {"chosen": [user, calling], "rejected": [user, answer]} if is_pair else {"messages": [user, calling]}
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: ends with a call, which evaluate cannot compare"):
        questions_of(row, match=match, **(KTO if is_pair else {}))


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "#### 7"}]


@pytest.mark.parametrize(
    ("data_format", "settings"),
    [("messages", {}), ("conversations", {}), ("prompt_completion", {}), ("conversations", KTO)],
)
def test_rows_are_read_by_the_data_format_of_the_run(
    questions_of: Read, data_format: str, settings: dict[str, Any]
):
    """Otherwise, a row with the columns of several formats is compared with another answer than the trained one."""
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "#### 8"}]
    row = {**ROW, "messages": CHAT, "conversations": turns}
    expected = {"messages": "#### 7", "conversations": "#### 8", "prompt_completion": "#### 4"}
    (question,) = questions_of(row, data_format=data_format, **settings)
    assert question.expected == expected[data_format]


def test_rows_of_a_run_on_texts_are_recognised(questions_of: Read):
    (question,) = questions_of(ROW, task="causal_lm", data_format="text")
    assert question.expected == "#### 4"


@pytest.mark.parametrize("changes", [{}, {"task": "preference_tuning", "unpaired": True}], ids=["sft", "kto"])
def test_a_question_has_the_digest_of_its_prepared_row(
    questions_of: Read, changes: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    """A rated row ends with its answer's end token, a chat with what the template writes after it."""
    rated = {**ROW, "label": True}
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps(rated if changes else ROW))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = prepare(request(source, **changes), tokenizer, tiny_model, tmp_path / "cache")
    questions = questions_of(ROW, rated, {**ROW, "prompt": "2 + 3?"}, {**rated, "prompt": "2 + 3?"}, **KTO)
    trained = [not question.digests.isdisjoint(rows.index.digest.tolist()) for question in questions]
    assert trained == [True, True, False, False]


THINKING = "<think>\nIs it #### 5 or 6?\n</think>\n\n"


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "number"),
    [
        ("", "#### 4", "#### 4", "4"),
        ("", f"{THINKING}It is 4.", "It is 4.", "4"),
        ("<think>\n", "It is #### 5?\n</think>\n\nIt is 4.", "It is 4.", "4"),
        ("<think>\n", "It is #### 5?</think>It is 4.", "It is 4.", "4"),
        ("", "<think>\nIs it #### 5 or", None, None),
        ("<think>\n", "Is it #### 5 or", None, None),
        ("<think>\n\n</think>\n\n", "It is 4.", "It is 4.", "4"),
    ],
)
@pytest.mark.parametrize("expected", ["It is 4.", f"{THINKING}It is 4."])
def test_reasoning_is_not_compared(
    prompt: str, answer: str, text: str | None, number: str | None, expected: str
):
    question = Question("rows.jsonl:1", f"2 + 2?{prompt}", [1], expected, frozenset())
    by_text, by_number = (score(question, answer, match, AnswerMarks(), None) for match in ("text", "number"))
    assert (by_text.answer, by_text.expected) == (answer, expected)
    assert (by_text.answer_match, by_text.expected_match) == (text, "It is 4.")
    assert by_text.correct == (text == "It is 4.")
    assert (by_number.answer_match, by_number.correct) == (number, number == "4")


def test_a_number_is_expected_outside_the_reasoning(questions_of: Read):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer contains no number"):
        questions_of({**ROW, "completion": f"{THINKING}I do not know."})


GPT_OSS = (
    "gptoss",
    ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"),
)
GEMMA = ("gemma4_v5", ("<|channel>", "<channel|>", "<|turn>", "<turn|>"))
GLIMMER = ("muse_glimmer", ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"))
ANALYSIS = "<|channel|>analysis<|message|>Is it #### 5 or 6?"
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
PREAMBLE = "<|end|><|start|>assistant<|channel|>commentary<|message|>Is it 5?"


def tokenizer_of(template: tuple[str, tuple[str, ...]]) -> Any:
    """Return a tokenizer with a template that TRL ships and its special tokens."""
    name, special = template
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "text"),
    [
        (GPT_OSS, "", f"{ANALYSIS}{FINAL}It is 4.", "It is 4."),
        (GPT_OSS, "", f"{ANALYSIS}{PREAMBLE}{FINAL}It is 4.", "It is 4."),
        (GPT_OSS, "", "<|channel|>final<|message|>It is 4.", "It is 4."),
        (GPT_OSS, "", "<|channel|>final <|constrain|>json<|message|>It is 4.", "It is 4."),
        (GPT_OSS, "", "<|channel|>final json<|message|>It is 4.", "It is 4."),
        (GPT_OSS, "", f"{ANALYSIS}{FINAL}It is 4.<|end|><|start|>user<|message|>5 + 5?", "It is 4."),
        (GPT_OSS, "<|channel|>analysis<|message|>", f"Is it 5?{FINAL}It is 4.", "It is 4."),
        (GPT_OSS, "<|channel|>final<|message|>", "It is 4.", "It is 4."),
        (GPT_OSS, "", "It is 4.", "It is 4."),
        (GPT_OSS, "", ANALYSIS, None),
        (GPT_OSS, "", "<|channel|>ana", None),
        (GPT_OSS, "", f"{ANALYSIS}{PREAMBLE}", None),
        (GPT_OSS, "<|channel|>analysis<|message|>", "Is it 5?", None),
        (GEMMA, "", "<|channel>thought\nIs it 5?\n<channel|>It is 4.", "It is 4."),
        (GEMMA, "<|channel>thought\n", "Is it 5?\n<channel|>It is 4.", "It is 4."),
        (GEMMA, "", "<|channel>thought\nIs it 5?", None),
        (
            GLIMMER,
            "",
            " to=self<|message|>Is it 5?<|eom|><|start|>assistant to=user<|message|>It is 4.",
            "It is 4.",
        ),
        (GLIMMER, "", " to=self<|message|>Is it 5?", None),
    ],
)
def test_only_the_answer_after_the_reasoning_is_compared(
    template: tuple[str, tuple[str, ...]], prompt: str, answer: str, text: str | None
):
    marks = find_marks(Renderer(tokenizer_of(template), whole_text=False))
    question = Question("rows.jsonl:1", f"2 + 2?{prompt}", [1], "It is 4.", frozenset())
    by_text, by_number = (score(question, answer, match, marks, None) for match in ("text", "number"))
    assert (by_text.answer, by_text.answer_match, by_text.correct) == (answer, text, text is not None)
    assert by_number.answer_match == (None if text is None else "4")


def test_marks_of_reasoning_are_part_of_an_answer():
    tokenizer = tokenizer_of(GPT_OSS)
    marks = find_marks(Renderer(tokenizer, whole_text=False))
    stops = tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    left_out = tokens_left_out(tokenizer, stops, marks.tokens)
    assert set(stops) <= left_out
    assert left_out.isdisjoint(
        tokenizer.convert_tokens_to_ids(["<|channel|>", "<|message|>", "<|start|>", "<|end|>"])
    )
    assert tokenizer.convert_tokens_to_ids("<|constrain|>") in left_out
