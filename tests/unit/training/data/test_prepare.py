import copy
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from transformers import PreTrainedTokenizerFast

from tests.support.messages import assert_names
from tests.support.prepared import prepare, request, rows_of
from tests.support.tiny_model import write_data
from training.data.errors import DataError
from training.data.prepare import prepare_data
from training.data.prepared import SKIPPED_FILE, fetch_prepared, keep_prepared, verify_prepared
from training.data.report import describe_rows, describe_split
from training.data.row_index import DATA_FILE, IGNORED
from training.data.summary import PIECE_TOKENS

Turns = list[tuple[str, str]]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_summary_matches_the_prepared_rows(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, _ = write_data(tmp_path)
    prepared = prepare(request(train), chatml, tiny_model, tmp_path / "cache")
    rows, summary = rows_of(prepared), prepared.summary
    assert [row["row"] for row in rows] == list(range(1, 41))
    assert summary.rows == 40
    assert summary.tokens == sum(len(row["input_ids"]) for row in rows) == sum(row["tokens"] for row in rows)
    trained = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    assert [row["trained_tokens"] for row in rows] == trained
    assert summary.trained_tokens == sum(trained)
    assert summary.longest == summary.lengths.longest == max(row["tokens"] for row in rows)
    assert sum(summary.lengths.counts) == 40
    assert (summary.truncated_rows, summary.dropped_rows, summary.lost_tokens, summary.skipped_rows) == (
        0,
        0,
        0,
        {},
    )
    assert [(source.path, source.format, source.rows, source.taken) for source in summary.sources] == [
        (str(train), "messages", 40, 40)
    ]
    source_rows = [json.loads(line)["messages"] for line in train.read_text().splitlines()]
    for example, messages in zip(
        summary.examples, [source_rows[0], source_rows[20], source_rows[39]], strict=True
    ):
        assert "".join(text for text, _ in example) == chatml.apply_chat_template(messages, tokenize=False)
        assert [text for text, is_trained in example if is_trained] == [f"{messages[1]['content']}<|im_end|>"]
    assert prepared.places([2, 4]) == f"3, 5 of {train}"


@pytest.fixture
def short_and_long(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
) -> tuple[Path, int, int]:
    """Write a short row, a long answer and a long question; return (file, tokens of the first row, of the second)."""
    rows = [chat("2 + 2?", "4"), chat("Count.", "1 2 3 " * 60), chat("1 2 3 " * 60, "So?")]
    path = write(tmp_path / "rows.jsonl", *rows)
    lengths = prepare(request(path), chatml, tiny_model, tmp_path / "cache").index.length
    return path, int(lengths[0]), int(lengths[1])


@pytest.mark.parametrize("limit", ["context_length", "max_context"])
def test_long_rows_are_truncated_and_counted(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    short_and_long: tuple[Path, int, int],
    limit: str,
):
    path, short, long = short_and_long
    tokens = (short + long) // 2
    prepared = prepare(request(path, **{limit: tokens}), chatml, tiny_model, tmp_path / "cache")
    rows = rows_of(prepared)
    untruncated = rows_of(prepare(request(path), chatml, tiny_model, tmp_path / "cache"))
    assert [(row["row"], row["tokens"]) for row in rows] == [(1, short), (2, tokens)]
    assert rows[1]["input_ids"] == untruncated[1]["input_ids"][:tokens]
    assert rows[1]["labels"] == untruncated[1]["labels"][:tokens]
    # The third row's answer starts after the limit, so the row has no loss tokens.
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (1, 1)
    assert prepared.summary.tokens + prepared.summary.lost_tokens == sum(row["tokens"] for row in untruncated)
    (skipped,) = [json.loads(line) for line in (prepared.directory / SKIPPED_FILE).read_text().splitlines()]
    assert (skipped["file"], skipped["row"]) == (str(path), 3)
    assert f" {tokens} tokens" in skipped["reason"]


def test_long_rows_are_dropped_and_counted(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, short_and_long: tuple[Path, int, int]
):
    path, short, long = short_and_long
    data = request(path, context_length=short, long_rows="drop")
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    assert [row["row"] for row in rows_of(prepared)] == [1]
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (0, 2)
    assert prepared.summary.lengths.longest >= long, "lengths are measured before rows are dropped"


def test_a_row_of_several_sequences_is_counted_once_by_the_errors_of_long_rows(
    tiny_model: Path, chatml: PreTrainedTokenizerFast, tmp_path: Path
):
    """Qwen3's template renders an earlier turn otherwise once another follows."""
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
    path = tmp_path / "rows.jsonl"
    messages = [{"role": role, "content": "many words " * 20} for role in ("user", "assistant") * 2]
    path.write_text(json.dumps({"messages": messages}))
    data = request(path, context_length=40, long_rows="error")
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert "1 row above the limit of 40 tokens" in str(caught.value)
    assert str(caught.value).count(f"{path}:1:") == 1
    for long_rows in ("truncate", "drop"):
        with pytest.raises(DataError, match=r"\(1 row dropped\)"):
            prepare(replace(data, long_rows=long_rows), tokenizer, tiny_model, tmp_path / "cache")


def test_long_rows_raise_an_error_that_names_them(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, short_and_long: tuple[Path, int, int]
):
    path, short, long = short_and_long
    data = request(path, context_length=short, long_rows="error")
    with pytest.raises(DataError) as caught:
        prepare(data, chatml, tiny_model, tmp_path / "other")
    assert_names(
        str(caught.value), "long_rows", "2 ", f"{short} tokens", f"{path}:2: {long} tokens", "context_length"
    )
    assert [found.suffix for found in (tmp_path / "other" / "prepared").iterdir()] == [".lock"]
    longer = replace(data, context_length=1000)
    assert prepare(longer, chatml, tiny_model, tmp_path / "other").summary.rows == 3


def test_data_without_loss_tokens_raises_an_error(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    with pytest.raises(DataError, match=r"4 tokens.*40 rows.*context_length"):
        prepare(request(train, context_length=4), chatml, tiny_model, tmp_path / "cache")


BAD = [
    b"{bad",
    chat("2 + 2?", " "),
    {"prompt": "2 + 2?", "completion": "4"},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "tool", "content": "4"}]},
    {"messages": [{"role": "robot", "content": "4"}]},
    chat("2 + 2?", "4\x00"),
    chat("2 + 2?", "4" * 9_000_000),
]
GOOD = [chat("2 + 2?", "4"), chat("3 + 3?", "6")]


def test_bad_rows_are_counted_by_fault_and_the_first_are_shown(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", GOOD[0], *BAD, GOOD[1])
    with pytest.raises(DataError) as caught:
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 of 9 rows ")
    faults = ("JSON", "empty", "mixed", "role order", "unknown role", "NUL", "too large")
    counted = lines[0].partition("(")[2].split(", ")
    assert [
        fault in count and count.startswith("1 ") for fault, count in zip(faults, counted, strict=True)
    ] == [True] * 7
    assert [line.split(": ")[0] for line in lines[1:6]] == [f"{path}:{row}" for row in range(2, 7)]
    assert len(lines) == 8
    assert " 2 more" in lines[6]
    assert "bad_rows: skip" in lines[7]
    assert_names(lines[3], "prompt and completion", "messages")


def test_skipped_rows_are_counted_and_written_with_their_reasons(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", GOOD[0], *BAD, GOOD[1])
    prepared = prepare(request(path, bad_rows="skip"), chatml, tiny_model, tmp_path / "cache")
    assert [row["row"] for row in rows_of(prepared)] == [1, 9]
    assert sum(prepared.summary.skipped_rows.values()) == 7
    skipped = [json.loads(line) for line in (prepared.directory / SKIPPED_FILE).read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in skipped] == [(str(path), row) for row in range(2, 9)]
    assert_names(skipped[1]["reason"], "message 2 (assistant)", "empty")
    assert skipped[2]["content"] == '{"prompt": "2 + 2?", "completion": "4"}'
    all_bad = write(tmp_path / "nothing.jsonl", *BAD)
    with pytest.raises(DataError, match=r"^7 of 7 rows "):
        prepare(request(all_bad, bad_rows="skip"), chatml, tiny_model, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_rows_raises_an_error(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, content: bytes
):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"/rows\.jsonl: .*no rows"):
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")


def test_duplicate_rows_are_counted_with_their_locations(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    first = write(tmp_path / "a.jsonl", *GOOD)
    second = write(tmp_path / "b.jsonl", chat("5 + 5?", "10"), GOOD[1], GOOD[1])
    summary = prepare(request(first, second), chatml, tiny_model, tmp_path / "cache").summary
    assert summary.duplicates == 2
    assert [re.findall(r"\S+:\d+", line) for line in summary.first_duplicates] == [
        [f"{second}:2", f"{first}:2"],
        [f"{second}:3", f"{first}:2"],
    ]


def test_sources_are_mixed_by_weight(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, valid = write_data(tmp_path, train_rows=40, valid_rows=20)
    data = request(train, valid, weights=(1.0, 3.0))
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    rows = rows_of(prepared)
    assert [source.taken for source in prepared.summary.sources] == [15, 45]
    assert prepared.summary.rows == len(rows) == 60
    assert prepared.summary.tokens == sum(len(row["input_ids"]) for row in rows)
    rows_by_source = [[row["row"] for row in rows if row["file"] == file] for file in (0, 1)]
    assert len(set(rows_by_source[0])) == 15, "a downsampled source repeats no row"
    assert sorted(np.bincount(rows_by_source[1], minlength=21)[1:]) == [2] * 15 + [3] * 5
    plain = rows_of(prepare(request(train, valid), chatml, tiny_model, tmp_path / "cache"))
    assert all(row["input_ids"] == plain[row["row"] - 1 + 40 * row["file"]]["input_ids"] for row in rows)
    repeated = prepare(data, chatml, tiny_model, tmp_path / "repeated").summary
    assert repeated == prepared.summary


def test_weighted_source_without_valid_rows_raises_an_error(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    good = write(tmp_path / "good.jsonl", chat("2 + 2?", "4"))
    bad = write(tmp_path / "bad.jsonl", chat("2 + 2?", ""))
    data = request(good, bad, weights=(1.0, 1.0), bad_rows="skip")
    with pytest.raises(DataError, match=rf"{bad}: .*weight|{bad}: .*share"):
        prepare(data, chatml, tiny_model, tmp_path / "cache")
    assert prepare(replace(data, weights=None), chatml, tiny_model, tmp_path / "cache").summary.rows == 1


def test_an_example_with_a_long_question_shows_its_answer(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    question, answer = "1 2 3 " * 500, "So? " + "4 5 6 " * 500
    path = write(tmp_path / "rows.jsonl", chat(question, answer))
    prepared = prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    (example,) = prepared.summary.examples
    (trained,) = [text for text, is_trained in example if is_trained]
    assert trained.startswith("So? 4") and trained.endswith("6 <|im_end|>")
    omitted = [re.findall(r" … ([0-9,]+) tokens … ", text) for text, _ in example]
    assert omitted[1] == [f"{prepared.summary.trained_tokens - PIECE_TOKENS:,}"]
    assert len(omitted[0]) == 1, "the question is shortened as well"


def test_data_is_prepared_once_per_node(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, _ = write_data(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        prepared = list(
            pool.map(lambda _: prepare(request(train), chatml, tiny_model, tmp_path / "cache"), range(4))
        )
    assert all(other == prepared[0] for other in prepared)
    written = (prepared[0].directory / DATA_FILE).stat()
    repeated = prepare(request(train), chatml, tiny_model, tmp_path / "cache")
    assert repeated == prepared[0]
    found = (repeated.directory / DATA_FILE).stat()  # its access time may differ
    assert (found.st_ino, found.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    name = repeated.directory.name
    entries = {entry.name for entry in (tmp_path / "cache" / "prepared").iterdir()}
    assert entries == {name, f"{name}.lock"}


def test_fingerprint_does_not_depend_on_the_path(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    elsewhere = tmp_path / "copy.jsonl"
    shutil.copy(train, elsewhere)
    here, there = (
        prepare(request(path), chatml, tiny_model, tmp_path / "cache") for path in (train, elsewhere)
    )
    assert here.summary.fingerprint == there.summary.fingerprint
    assert there.place(0) == f"{elsewhere}:1"


def test_prepared_data_is_read_from_the_bucket(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    bucket = str(tmp_path / "bucket" / "prepared")
    first = prepare(request(train), chatml, tiny_model, tmp_path / "driver")
    keep_prepared(first, bucket)
    fractions: list[float] = []
    repeated = prepare_data(
        request(train),
        chatml,
        tiny_model,
        tmp_path / "another driver",
        bucket=bucket,
        progress=lambda rows, fraction: fractions.append(fraction),
    )
    assert repeated.summary == first.summary
    assert np.array_equal(repeated.index.digest, first.index.digest)
    assert not (tmp_path / "another driver").exists(), "the data was not prepared a second time"
    on_worker = fetch_prepared(first.key, tmp_path / "worker", bucket)
    assert rows_of(on_worker) == rows_of(first)
    verify_prepared(on_worker)


def test_damaged_tokens_raise_an_error(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, _ = write_data(tmp_path)
    prepared = prepare(request(train), chatml, tiny_model, tmp_path / "cache")
    tokens = prepared.directory / DATA_FILE
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(DataError, match=rf"corrupt.*{prepared.key}"):
        verify_prepared(prepared)


def test_cache_key_depends_on_every_input_of_the_tokens(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    other_model = shutil.copytree(tiny_model, tmp_path / "model")
    (other_model / "chat_template.jinja").write_text("{{ messages }}")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    plain = request(train)

    def key(data: Any, model: Path) -> str:
        return prepare(data, chatml, model, tmp_path / "cache").key

    keys = [
        key(data, model)
        for data, model in [
            (plain, tiny_model),
            (plain, other_model),
            (request(changed), tiny_model),
            (replace(plain, context_length=60), tiny_model),
            (replace(plain, context_length=60, long_rows="drop"), tiny_model),
            (replace(plain, task="causal_lm"), tiny_model),
            (replace(plain, bad_rows="skip"), tiny_model),
            (replace(plain, chat_template=chatml.chat_template), tiny_model),
        ]
    ]
    assert len(set(keys)) == len(keys)


def test_truncation_retains_the_prompt_of_a_pair(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(
        tmp_path / "pairs.jsonl",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5 " * 50},
        {"prompt": "2 + 2? " * 50, "chosen": "4", "rejected": "5"},
    )
    data = request(path, task="preference_tuning", context_length=40)
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    (row,) = rows_of(prepared)
    assert len(row["prompt_ids"]) + len(row["rejected_ids"]) == row["length"] == 40
    assert row["tokens"] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert row["trained_tokens"] == len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert chatml.decode(row["chosen_ids"]) == "4<|im_end|>"
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (1, 1)


def test_unpaired_rows_store_their_response_on_one_side(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(
        tmp_path / "rated.jsonl",
        {"prompt": "2 + 2?", "completion": "4", "label": True},
        {"prompt": "2 + 3?", "completion": "6 " * 50, "label": False},
        {"prompt": "2 + 2? " * 50, "completion": "4", "label": True},
    )
    data = request(path, task="preference_tuning", unpaired=True, context_length=40)
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    good, bad = rows_of(prepared)
    assert (chatml.decode(good["chosen_ids"]), good["rejected_ids"]) == ("4<|im_end|>", [])
    assert bad["chosen_ids"] == []
    assert len(bad["prompt_ids"]) + len(bad["rejected_ids"]) == bad["tokens"] == 40
    assert bad["trained_tokens"] == len(bad["rejected_ids"])
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (1, 1)
    assert prepared.summary.examples[0][-2:] == [(" … chosen: … ", False), ("4<|im_end|>", True)]
    with pytest.raises(DataError, match=r"(?s)3 of 3 rows.*loss: kto"):
        prepare(replace(data, unpaired=False), chatml, tiny_model, tmp_path / "cache")


def test_errors_of_a_chat_template_name_it(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    message = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "2 + 2?"}, message]})
    with pytest.raises(DataError, match=r"reasoning[^$]*The chat template is my\.jinja"):
        prepare_data(request(path), chatml, tiny_model, tmp_path / "cache", template="my.jinja")


def test_the_date_that_a_template_prints_is_recorded(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "completion": "4"})
    dated = copy.deepcopy(chatml)
    dated.chat_template = "{{ strftime_now('%Y') }}" + str(chatml.chat_template)
    prepared = prepare(request(path, date="2020-05-06"), dated, tiny_model, tmp_path / "dated")
    assert prepared.summary.date == "2020-05-06"
    assert chatml.decode(prepared.dataset()[0]["input_ids"]).startswith("2020")
    assert prepare(request(path), chatml, tiny_model, tmp_path / "cache").summary.date is None


def test_ignored_columns_are_counted(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2 + 2?", "completion": "4", "score": 5.2, "source": "web"},
        {"prompt": "2 + 3?", "completion": "5"},
    )
    with pytest.raises(DataError, match=r"`score`.*ignore_columns: \[score\]"):
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    data = request(path, ignore_columns=("score", "source"))
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    assert prepared.summary.rows == 2
    assert prepared.summary.notes == {
        "column `score` is ignored (ignore_columns)": 1,
        "column `source` is ignored (ignore_columns)": 1,
    }


def test_classification_rows_store_their_label_index(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(
        tmp_path / "a.jsonl", {"text": "I like it", "label": "good"}, {"text": "Not me", "label": "bad"}
    )
    data = request(path, task="classification", labels=("bad", "good"))
    rows = rows_of(prepare(data, chatml, tiny_model, tmp_path / "cache"))
    assert [row["label"] for row in rows] == [1, 0]
    with pytest.raises(DataError, match=r"'good'.*classifier_config"):
        prepare(replace(data, labels=("bad", "fine")), chatml, tiny_model, tmp_path / "cache")


def test_a_split_takes_whole_rows_by_seed_and_keeps_equal_rows_together(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    rows = [chat(f"{number} + 1?", str(number + 1)) for number in range(200)]
    path = write(tmp_path / "rows.jsonl", *rows, *rows[:40])

    def taken(share: tuple[float, float], seed: int = 42) -> list[int]:
        data = request(path, share=share, seed=seed)
        return [row["row"] for row in rows_of(prepare(data, chatml, tiny_model, tmp_path / "cache"))]

    train, valid = taken((0.2, 1.0)), taken((0.0, 0.2))
    assert sorted(train + valid) == list(range(1, 241))
    assert 20 < len(valid) < 80
    assert {row + 200 for row in valid if row <= 40} == {row for row in valid if row > 200}
    assert taken((0.0, 0.2), seed=1) != valid


def test_an_empty_share_of_a_split_raises_an_error(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", chat("2 + 2?", "4"))
    with pytest.raises(DataError, match=r"part of the split.*valid_split, or set valid_path"):
        prepare(request(path, share=(0.0, 1e-9)), chatml, tiny_model, tmp_path / "cache")


def test_max_rows_takes_the_first_rows_of_each_source(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    first, second = (
        write(tmp_path / f"{name}.jsonl", *(chat(f"{name} {number}?", "4") for number in range(5)))
        for name in ("a", "b")
    )
    prepared = prepare(request(first, second, max_rows=2), chatml, tiny_model, tmp_path / "cache")
    assert [(row["file"], row["row"]) for row in rows_of(prepared)] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_an_example_of_a_pair_shows_both_answers(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    prepared = prepare(request(path, task="preference_tuning"), chatml, tiny_model, tmp_path / "cache")
    ((prompt, *answers),) = prepared.summary.examples
    assert prompt[0].endswith("assistant\n")
    assert answers == [
        (" … chosen: … ", False),
        ("4<|im_end|>", True),
        (" … rejected: … ", False),
        ("5<|im_end|>", True),
    ]


def test_a_misspelled_variable_of_the_template_raises_an_error(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", GOOD[0])
    data = request(path, chat_template_kwargs=(("add_generation_promt", True),))
    with pytest.raises(DataError, match=r"chat_template_kwargs\.add_generation_promt.*add_generation_prompt"):
        prepare(data, chatml, tiny_model, tmp_path / "cache")


def test_rows_that_the_template_rejects_do_not_blame_the_format(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    with pytest.raises(DataError) as caught:
        prepare(request(write(tmp_path / "rows.jsonl", GOOD[0])), tokenizer, tiny_model, tmp_path / "cache")
    assert "No row fits the YAML" not in str(caught.value)
    assert_names(str(caught.value).splitlines()[-1], "No row can be rendered", "set chat_template")


def test_notes_and_split_rows_are_counted(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    """The template gives every turn but the last another end, so a chat of two turns becomes two sequences."""
    turns = [*chat("2 + 2?", "4")["messages"], *chat("3 + 3?", "6")["messages"]]
    path = write(tmp_path / "rows.jsonl", {"messages": turns, "topic": "sums"}, chat("<|im_end|> 2?", "2"))
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = str(chatml.chat_template).replace(
        "'<|im_end|>\n'",
        "('<|endoftext|>' if message['role'] == 'assistant' and not loop.last else '<|im_end|>') + '\n'",
    )
    assert tokenizer.chat_template != chatml.chat_template
    prepared = prepare(request(path), tokenizer, tiny_model, tmp_path / "cache")
    assert [row["row"] for row in rows_of(prepared)] == [1, 1, 2]
    assert (prepared.summary.split_rows, prepared.summary.split_sequences) == (1, 2)
    assert describe_split(prepared.summary).startswith("1 row became 2 sequences")
    assert describe_rows(prepared.summary).startswith("3 sequences in 1 file")
    assert prepared.summary.notes == {
        "column `topic` is not used": 1,
        "user messages contain special tokens of the tokenizer": 1,
    }


def test_rows_with_the_same_fault_are_shown_once_with_their_number(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    roles = [f"narrator{number}" if number % 2 == 0 else f"it's {number}" for number in range(12)]
    faulty = [{"messages": [{"role": role, "content": "4"}]} for role in roles]
    path = write(tmp_path / "rows.jsonl", *faulty, b"{bad", GOOD[0])
    with pytest.raises(DataError) as caught:
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    first, same, other, *rest = str(caught.value).splitlines()
    assert first.startswith("13 of 14 rows ")
    assert_names(same, f"{path}:1: ", "narrator0", "11 more rows")
    assert other.startswith(f"{path}:13: ")
    assert len(rest) == 1
