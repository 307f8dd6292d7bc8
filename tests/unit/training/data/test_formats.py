"""Every row format and file type yields the expected text and loss tokens."""

import copy
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.schema import DataFormat
from tests.support.prepared import prepare, request, rows_of
from training.data.errors import DataError
from training.data.prepared import PreparedData
from training.data.records import Task
from training.data.row_index import IGNORED

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN, SIX = {"role": "user", "content": "And 2 more?"}, {"role": "assistant", "content": "It is 6."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
}
TOOL = {"role": "tool", "content": "4"}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}},
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


CHAT = turn("user", "2 + 2?") + turn("assistant", "It is 4.")
ANSWER = "It is 4.<|im_end|>"

CASES: list[tuple[str, Task, DataFormat, dict[str, Any], str, list[str]]] = [
    ("messages", "instruction_tuning", "messages", {"messages": [USER, ASSISTANT]}, CHAT, [ANSWER]),
    (
        "system",
        "instruction_tuning",
        "messages",
        {"messages": [SYSTEM, USER, ASSISTANT]},
        turn("system", "Be brief.") + CHAT,
        [ANSWER],
    ),
    (
        "weight",
        "instruction_tuning",
        "messages",
        {"messages": [USER, ASSISTANT | {"weight": 0}, AGAIN, SIX | {"weight": 1}]},
        CHAT + turn("user", "And 2 more?") + turn("assistant", "It is 6."),
        ["It is 6.<|im_end|>"],
    ),
    (
        "tools",
        "instruction_tuning",
        "messages",
        {"messages": [USER, CALL, TOOL, ASSISTANT], "tools": TOOLS},
        turn("tools", json.dumps(TOOLS))
        + turn("user", "2 + 2?")
        + turn("assistant", '{"name": "add", "arguments": {"a": 2, "b": 2}}')
        + turn("tool", "4")
        + turn("assistant", "It is 4."),
        ['{"name": "add", "arguments": {"a": 2, "b": 2}}<|im_end|>', ANSWER],
    ),
    (
        "conversations",
        "instruction_tuning",
        "conversations",
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
        CHAT,
        [ANSWER],
    ),
    (
        "prompt_completion",
        "instruction_tuning",
        "prompt_completion",
        {"prompt": "2 + 2?", "completion": "It is 4."},
        CHAT,
        [ANSWER],
    ),
    (
        "instruction",
        "instruction_tuning",
        "instruction",
        {"instruction": "Add.", "input": "2 + 2", "output": "It is 4."},
        turn("user", "Add.\n\n2 + 2") + turn("assistant", "It is 4."),
        [ANSWER],
    ),
    ("text", "causal_lm", "text", {"text": "Once upon a time"}, "Once upon a time<|im_end|>", ["Once upon a time<|im_end|>"]),
    ("causal chat", "causal_lm", "messages", {"messages": [USER, ASSISTANT]}, CHAT, [CHAT]),
    (
        "label",
        "classification",
        "classification",
        {"text": "I like it", "label": "good"},
        turn("user", "I like it") + "<|im_start|>assistant\ngood",
        ["good"],
    ),
    (
        "chat label",
        "classification",
        "messages",
        {"messages": [USER, {"role": "assistant", "content": "bad"}]},
        turn("user", "2 + 2?") + "<|im_start|>assistant\nbad",
        ["bad"],
    ),
    (
        "preference",
        "preference_tuning",
        "preference",
        {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5"},
        CHAT.rstrip(),
        [ANSWER],
    ),
    (
        "preference without prompt",
        "preference_tuning",
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "5"}]},
        CHAT.rstrip(),
        [ANSWER],
    ),
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose chat template renders tools and tool calls."""
    changed = copy.deepcopy(AutoTokenizer.from_pretrained(tiny_model))
    changed.chat_template = TOOL_TEMPLATE
    return changed


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the file type of the path's suffix."""
    kind = path.name.partition(".")[2]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match kind:
        case "jsonl":
            path.write_text(lines)
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                for row in rows:
                    cells = {
                        name: value if isinstance(value, str) else json.dumps(value)
                        for name, value in row.items()
                    }
                    writer.writerow(cells)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "jsonl.zst":
            path.write_bytes(pa.Codec("zstd").compress(lines.encode(), asbytes=True))
        case _:
            raise AssertionError(kind)
    return path


def texts_and_loss_pieces(
    tokenizer: PreTrainedTokenizerFast, prepared: PreparedData
) -> list[tuple[str, list[str]]]:
    """Return the text and the runs of loss tokens of each row; for a pair, those of the chosen response."""
    found = []
    for row in prepared.dataset():
        if "prompt_ids" in row:
            ids = row["prompt_ids"] + row["chosen_ids"]
            labels = [IGNORED] * len(row["prompt_ids"]) + row["chosen_ids"]
        else:
            ids, labels = row["input_ids"], row["labels"]
        pieces: list[list[int]] = [[]]
        for label in labels:
            if label != IGNORED:
                pieces[-1].append(label)
            elif pieces[-1]:
                pieces.append([])
        found.append((tokenizer.decode(ids), [tokenizer.decode(piece) for piece in pieces if piece]))
    return found


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize(("task", "data_format", "row", "text", "trained"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])  # fmt: skip
def test_every_format_has_the_same_loss_text_in_every_file_type(
    tokenizer: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    kind: str,
    task: Task,
    data_format: DataFormat,
    row: dict[str, Any],
    text: str,
    trained: list[str],
):
    path = write(tmp_path / f"rows.{kind}", [row])
    data = request(path, task=task, labels=("bad", "good") if task == "classification" else ())
    prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [source.format for source in prepared.summary.sources] == [data_format]
    assert texts_and_loss_pieces(tokenizer, prepared) == [(text, trained)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.zst"])
def test_row_of_10_mb_is_skipped_or_raises_an_error(
    tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, kind: str
):
    rows = [{"prompt": "2 + 2?", "completion": "4" * 10_000_000}, {"prompt": "2 + 2?", "completion": "4"}]
    path = write(tmp_path / f"rows.{kind}", rows)
    if kind in ("json", "csv"):  # the start of the next row cannot be determined reliably
        with pytest.raises(DataError, match=rf"rows.{kind}:[12]: .*8( MB|000000)"):
            prepare(request(path), tokenizer, tiny_model, tmp_path / "cache")
        return
    prepared = prepare(request(path, bad_rows="skip"), tokenizer, tiny_model, tmp_path / "cache")
    assert prepared.summary.skipped_rows == {"too large": 1}
    assert len(prepared.index) == 1


def test_prompt_template_formats_rows(tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    rows = [{"instruction": "Add 2 and 2.", "output": "It is 4."}, {"instruction": "Say 3.", "output": "3"}]
    template = "### Instruction: {instruction} ### Response: {output}"
    data = request(write(tmp_path / "rows.csv", rows), prompt_template=template)
    prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert texts_and_loss_pieces(tokenizer, prepared) == [
        ("### Instruction: Add 2 and 2. ### Response: It is 4.<|im_end|>", ["It is 4.<|im_end|>"]),
        ("### Instruction: Say 3. ### Response: 3<|im_end|>", [" 3<|im_end|>"]),
    ]


def test_sources_may_have_different_formats(
    tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    """A file, a directory and a glob have one format each."""
    for name in ("day-1", "day-2", "more"):
        (tmp_path / name).mkdir()
    file = write(tmp_path / "rows.parquet", [{"messages": [USER, ASSISTANT]}])
    write(tmp_path / "more" / "a.jsonl.zst", [{"prompt": "1?", "completion": "one"}])
    write(tmp_path / "more" / "b.csv", [{"prompt": "2?", "completion": "two"}])
    for day in (1, 2):
        turns = [{"from": "human", "value": f"{day}?"}, {"from": "gpt", "value": f"day {day}"}]
        write(tmp_path / f"day-{day}" / "part.jsonl.gz", [{"conversations": turns}])
    data = request(file, tmp_path / "more", tmp_path / "day-*" / "*.gz")
    prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [(source.format, source.files, source.rows) for source in prepared.summary.sources] == [
        ("messages", 1, 1),
        ("prompt_completion", 2, 2),
        ("conversations", 2, 2),
    ]
    answers = [
        pieces[0].removesuffix("<|im_end|>") for _, pieces in texts_and_loss_pieces(tokenizer, prepared)
    ]
    assert answers == ["It is 4.", "one", "two", "day 1", "day 2"]


def test_results_of_tools_give_the_same_tokens_from_json_lines_and_parquet(
    tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    """Parquet gives each object of a column the keys of all others."""

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    begin = [said("user", "How warm is it?"), said("assistant", "[look(city=1)]")]
    results = [[{"warm": 21}], [{"wet": True, "wind": {"from": "north"}}], [{"wind": {"speed": 3}}]]
    rows = [
        {"messages": [*begin, {"role": "tool", "content": result}, said("assistant", "Warm.")]}
        for result in results
    ]
    lines, table = (
        prepare(request(write(tmp_path / f"rows.{kind}", rows)), tokenizer, tiny_model, tmp_path / kind)
        for kind in ("jsonl", "parquet")
    )
    assert rows_of(table) == rows_of(lines)
    assert '[{"warm": 21}]' in texts_and_loss_pieces(tokenizer, table)[0][0]
    assert table.summary.notes["null entries of objects in results of tools are removed"] == 3
