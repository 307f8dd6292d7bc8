"""Rows of token ids are checked, and trained as they stand."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests.support.messages import assert_names
from tests.support.prepared import prepare, request, rows_of
from training.data.errors import DataError, RowError
from training.data.records import Task, Tokens
from training.data.row_index import IGNORED
from training.data.rows import RowSchema, read_row, recognise

IDS = [5, 6, 7, 8]
LABELS = [IGNORED, IGNORED, 7, 8]
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


def read(row: dict[str, Any], task: Task = "instruction_tuning") -> Tokens:
    tokens = read_row(row, RowSchema(task, recognise(row, {}, task), {}, None, ()))
    assert isinstance(tokens, Tokens)
    return tokens


def labels_of(tokens: Tokens) -> list[int]:
    return [token if trained else IGNORED for token, trained in zip(tokens.ids, tokens.trained, strict=True)]


@pytest.mark.parametrize(
    "columns",
    [
        {"labels": LABELS},
        {"assistant_masks": [0, 0, 1, 1]},
        {"completion_mask": [False, False, True, True]},
        {"loss_mask": [0, 0, 1, 1]},
        {"labels": [IGNORED, 6, 7, 8], "assistant_masks": [1, 0, 1, 1]},
        {"labels": LABELS, "attention_mask": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3], "seq_lengths": [4]},
        {"labels": LABELS, "assistant_masks": None, "messages": None},
    ],
    ids=lambda columns: " ".join(columns),
)
def test_labels_and_masks_say_which_tokens_are_in_the_loss(columns: dict[str, Any]):
    tokens = read({"input_ids": IDS, **columns})
    assert (tokens.ids.tolist(), labels_of(tokens), tokens.notes) == (IDS, LABELS, ())


@pytest.mark.parametrize("mask", [[0, 1, 1, 1], [1, 1, 1, 0]])
def test_padding_that_the_attention_mask_marks_is_removed(mask: list[int]):
    tokens = read({"input_ids": IDS, "labels": IDS, "attention_mask": mask})
    assert tokens.ids.tolist() == [token for token, real in zip(IDS, mask, strict=True) if real]
    assert_names(*tokens.notes, "padding", "attention_mask")


def test_causal_lm_trains_every_token_of_a_row():
    assert labels_of(read({"input_ids": IDS}, "causal_lm")) == IDS
    assert labels_of(read({"input_ids": IDS, "labels": IDS}, "causal_lm")) == IDS
    with pytest.raises(RowError) as wrong:
        read({"input_ids": IDS, "labels": LABELS}, "causal_lm")
    assert_names(str(wrong.value), "2 of 4", "`labels`", "task: instruction_tuning")


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"input_ids": IDS}, ("`labels`", "`assistant_masks`", "task: causal_lm")),
        ({"input_ids": IDS, "labels": LABELS[1:]}, ("`labels`", "3", "4")),
        ({"input_ids": IDS, "completion_mask": [0, 1]}, ("`completion_mask`", "2", "4")),
        ({"input_ids": IDS, "labels": [IGNORED, 6, 9, 8]}, ("`labels`", "entry 3", "9", "7")),
        ({"input_ids": IDS, "labels": [6, 7, 8, IGNORED]}, ("`labels`", "entry 1", "shifted by one")),
        ({"input_ids": IDS, "labels": [IGNORED] * 4}, ("loss", "`labels`")),
        ({"input_ids": IDS, "labels": [5, IGNORED, IGNORED, IGNORED]}, ("loss", "first token")),
        ({"input_ids": IDS, "assistant_masks": [0, 0, 2, 1]}, ("`assistant_masks`", "entry 3", "0 or 1")),
        ({"input_ids": [5, -1], "labels": [5, -1]}, ("`input_ids`", "entry 2", "-1")),
        ({"input_ids": [5, 2**70], "labels": [5, 2**70]}, ("`input_ids`", "entry 2")),
        ({"input_ids": [5, 6.0], "labels": [5, 6]}, ("`input_ids`", "entry 2", "6.0", "integer")),
        ({"input_ids": [True, 6], "labels": [1, 6]}, ("`input_ids`", "entry 1", "True")),
        ({"input_ids": [IDS], "labels": [LABELS]}, ("`input_ids`", "entry 1", "list", "one row for each")),
        ({"input_ids": [], "labels": []}, ("`input_ids`", "empty")),
        ({"input_ids": "five", "labels": LABELS}, ("`input_ids`", "JSON")),
        ({"input_ids": {"a": 1}, "labels": LABELS}, ("`input_ids`", "object", "list of numbers")),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": [1, 0, 1, 1]}, ("`attention_mask`", "entry 2", "`labels`")),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": [0] * 4}, ("`attention_mask`", "0")),
        ({"input_ids": IDS, "labels": LABELS, "position_ids": [0, 1, 0, 1]}, ("`position_ids`", "packing: true")),
        ({"input_ids": IDS, "labels": LABELS, "seq_lengths": [2, 2]}, ("`seq_lengths`", "packing: true")),
        ({"input_ids": IDS, "labels": LABELS, "images": ["a.png"]}, ("`images`", "text")),
    ],
    ids=lambda value: " ".join(value)[:60],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_as_it_stands_names_column_and_entry(
    row: dict[str, Any], facts: tuple[str, ...]
):
    with pytest.raises(RowError) as wrong:
        read(row)
    assert_names(str(wrong.value), *facts)


def test_tokens_of_a_row_with_messages_are_used_if_the_row_says_which_are_in_the_loss():
    both = {**CHAT, "input_ids": IDS}
    assert recognise(both, {}, "instruction_tuning") == "messages"
    tokens = read({**both, "labels": LABELS})
    assert tokens.notes == ("column `messages` is not used",)


def test_preference_tuning_names_the_tasks_of_pretokenised_rows():
    with pytest.raises(RowError) as wrong:
        recognise({"input_ids": IDS, "labels": LABELS}, {}, "preference_tuning")
    assert_names(str(wrong.value), "input_ids", "instruction_tuning", "preference_tuning")


def tokenized(chatml: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Return rows as `apply_chat_template` makes them, and one with special tokens that no template writes."""
    rows = []
    for answer in ("One.", "One and two.", "One, two and three."):
        ids = chatml.encode(f"<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")
        mask = [0] * (len(ids) - 4) + [1] * 4
        labels = [token if flag else IGNORED for token, flag in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    rows.append({"input_ids": [2, 2, 9, 1, 1], "labels": [IGNORED, 2, 9, 1, 1]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the file type of the path's suffix; without one, as `save_to_disk` does."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_tokens_and_labels_are_stored_as_the_row_has_them(
    name: str, chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    rows = tokenized(chatml)
    prepared = prepare(request(write(tmp_path / name, rows)), chatml, tiny_model, tmp_path / "cache")
    stored = rows_of(prepared)
    assert [row["input_ids"] for row in stored] == [row["input_ids"] for row in rows]
    assert [row["labels"] for row in stored] == [row["labels"] for row in rows]
    assert [row["trained_tokens"] for row in stored] == [4, 4, 4, 4]
    assert prepared.summary.sources[0].format == "tokens"
    assert prepared.summary.duplicates == 0


def test_long_rows_and_duplicates_are_treated_as_those_of_other_formats(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    rows = [{"input_ids": IDS * 3, "labels": IDS * 3}, {"input_ids": IDS, "labels": LABELS}]
    path = write(tmp_path / "a.jsonl", [*rows, rows[0]])
    cut = prepare(request(path, context_length=6), chatml, tiny_model, tmp_path / "cache")
    assert [row["input_ids"] for row in rows_of(cut)] == [[*IDS, 5, 6], IDS, [*IDS, 5, 6]]
    assert (cut.summary.truncated_rows, cut.summary.lost_tokens, cut.summary.duplicates) == (2, 12, 1)
    with pytest.raises(DataError) as long:
        prepare(request(path, context_length=6, long_rows="error"), chatml, tiny_model, tmp_path / "cache")
    assert_names(str(long.value), f"{path}:1", "12 tokens", "long_rows")


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([{"input_ids": IDS, "labels": LABELS}, CHAT], (":2", "messages", "input_ids", "separate source")),
        ([CHAT, {"input_ids": IDS, "labels": LABELS}], (":2", "messages", "input_ids", "separate source")),
        ([{"input_ids": [5, 10**6], "labels": [5, 10**6]}], (":1", "`input_ids`", "entry 2", "1000000", "tokenizer")),
    ],
    ids=["text after tokens", "tokens after text", "unknown token"],
)  # fmt: skip
def test_rows_of_another_format_or_vocabulary_are_rejected_with_their_place(
    rows: list[dict[str, Any]],
    facts: tuple[str, ...],
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as wrong:
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    assert_names(str(wrong.value), str(path), *facts)
