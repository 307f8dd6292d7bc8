import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tests.support.messages import assert_names
from training.data.errors import MAX_ROW_BYTES, DataError, RowError
from training.data.hub import is_hub_dataset, parse_hub_uri, parts_of
from training.data.sources import DataFile, files_of_other_splits, find_files, open_file
from utils.storage.bucket import BucketError

ROWS = [{"prompt": f"{number} + {number}?", "completion": f"{2 * number} é"} for number in range(5)]


def read(path: Path) -> list[tuple[int, Any]]:
    opened = open_file(DataFile(str(path), "", 0), path.parent / "cache")
    rows = list(opened.rows)
    assert opened.fraction() == 1 or not rows
    return rows


def reasons(path: Path) -> dict[int, str]:
    return {number: str(row) for number, row in read(path) if isinstance(row, RowError)}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def short_id(value: object) -> str:
    """Truncate a value to a test id, since pytest would print megabytes."""
    return repr(value)[:40]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.ndjson", b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", jsonl(ROWS)),
        ("a.json", "".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("a.csv", b"\xef\xbb\xbf" + as_csv(ROWS)),
        ("a.tsv", as_csv(ROWS, "\t")),
        ("a.tsv.gz", gzip.compress(as_csv(ROWS, "\t"), mtime=0)),
        ("a.parquet", as_parquet(ROWS)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)),
        ("a.jsonl.zst", zstd(jsonl(ROWS))),
        ("a.csv.gz", gzip.compress(as_csv(ROWS), mtime=0)),
        ("a.json.zst", zstd(json.dumps(ROWS).encode())),
        ("a", jsonl(ROWS)),
    ],
    ids=short_id,
)
def test_every_file_type_yields_the_same_rows(tmp_path: Path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    assert [row for _, row in read(path)] == ROWS


def test_rows_have_the_line_numbers_of_an_editor(tmp_path: Path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b"\n" + jsonl(ROWS[:1]) + b"\n" + jsonl(ROWS[:1]))
    assert [number for number, _ in read(lines)] == [2, 4]
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"one\nand two",3\nfour,5\n')
    assert read(table) == [
        (2, {"prompt": "one\nand two", "completion": "3"}),
        (4, {"prompt": "four", "completion": "5"}),
    ]


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (b"{bad", ("JSON",)),
        (b'{"messages": [', ("JSON",)),
        (b'"text"', ("string", "JSON object")),
        (b"[1]", ("list", "JSON object")),
        (b'{"prompt": "\xff"}', ("UTF-8", "byte 13")),
        (b"[" * 100_000, ("nested",)),
        (b'{"n": ' + b"9" * 5000 + b"}", ("JSON",)),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', ("10.0 MB", "8 MB")),
    ],
    ids=short_id,
)
def test_bad_line_is_reported_and_the_other_lines_are_read(
    tmp_path: Path, line: bytes, facts: tuple[str, ...]
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS[:1]) + line + b"\n" + jsonl(ROWS[:1]))
    assert [number for number, _ in read(path)] == [1, 2, 3]
    found = reasons(path)
    assert list(found) == [2]
    assert_names(found[2], *facts)


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.json", json.dumps(ROWS).encode()[:-30], ("a.json:5: ", "JSON")),
        ("a.json", json.dumps(ROWS).encode()[:-1], ("a.json:6: ", "truncated")),
        ("a.json", json.dumps(ROWS).encode() + b"[", ("a.json:6: ", "after")),
        ("a.json", b'[{"a": 1} {"a": 2}]', ("a.json:2: ", "JSON", "comma")),
        ("a.json", b"[" * 100_000, ("a.json:1: ", "nested")),
        ("a.json", b'[{"a": "' + b"b" * 2 * MAX_ROW_BYTES, ("a.json:1: ", "8 MB")),
        ("a.csv", b'prompt,completion\na,"b', ("a.csv:2: ", "CSV")),
        ("a.csv", b"prompt,prompt\na,b", ("a.csv:1: ", "header", "'prompt'")),
        ("a.csv", b"prompt;completion\na;b", ("a.csv:1: ", "header", "';'")),
        ("a.csv", b"prompt\tcompletion\na\tb", ("a.csv:1: ", "header", ".tsv")),
        ("a.tsv", b"prompt,completion\na,b", ("a.tsv:1: ", "header", "','", "TSV")),
        ("a.tsv", b'prompt\tcompletion\na\t"b', ("a.tsv:2: ", "TSV")),
        ("a.csv", jsonl(ROWS).decode().encode("utf-16"), ("a.csv: ", "UTF-16", "UTF-8")),
        ("a.jsonl", jsonl(ROWS).decode().encode("utf-16"), ("a.jsonl: ", "UTF-16", "UTF-8")),
        ("a.jsonl", gzip.compress(jsonl(ROWS), mtime=0), ("a.jsonl: ", ".gz")),
        ("a.json", zstd(jsonl(ROWS)), ("a.json: ", ".zst")),
        ("a.csv", as_parquet(ROWS), ("a.csv: ", ".parquet")),
        ("a.csv", b"prompt,completion\n" + b"a," * MAX_ROW_BYTES, ("a.csv:2: ", "8 MB")),
        ("a.parquet", b"", ("a.parquet: ", "Parquet")),
        ("a.parquet", as_parquet(ROWS)[:-20], ("a.parquet: ", "Parquet")),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)[:-20], ("a.jsonl.gz:", "corrupt")),
        ("a.jsonl.gz", jsonl(ROWS), ("a.jsonl.gz:1: ", "corrupt")),
        ("a.jsonl.zst", zstd(jsonl(ROWS))[:-20], ("a.jsonl.zst:", "corrupt")),
        ("a.xlsx", b"PK", ("a.xlsx: ", ".xlsx")),
        ("a.parquet.gz", b"", ("a.parquet.gz: ", "Parquet")),
    ],
    ids=short_id,
)
def test_damaged_file_raises_an_error_with_its_location(
    tmp_path: Path, name: str, content: bytes, facts: tuple[str, ...]
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert_names(str(caught.value), *facts)


def test_invalid_utf_8_is_read_as_surrogates(tmp_path: Path):
    """The check of the row rejects surrogates later."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na\xff,b\n")
    ((_, row),) = read(path)
    with pytest.raises(UnicodeEncodeError):
        row["prompt"].encode()


def test_cells_without_a_column_are_a_row_error(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b,c\nd,e\n")
    found = reasons(path)
    assert list(found) == [2]
    assert_names(found[2], "3 cells", "2 columns")


def test_directories_and_globs_list_their_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (
        "b.jsonl",
        "a.parquet",
        "deep/c.csv",
        "deep/deeper/f.jsonl",
        "g[1].jsonl",
        "_SUCCESS",
        "notes.md",
        ".hidden/d.jsonl",
        "_old/e.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jsonl(ROWS))

    def names(path: str) -> list[str]:
        return [os.path.relpath(file.uri, tmp_path) for file in find_files(path, 0)]

    assert names(str(tmp_path)) == ["a.parquet", "b.jsonl", "deep/c.csv", "deep/deeper/f.jsonl", "g[1].jsonl"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl", "g[1].jsonl"]
    assert names(f"{tmp_path}/d*/*.csv") == ["deep/c.csv"]
    assert names(f"{tmp_path}/**/[a-f].*") == ["a.parquet", "b.jsonl", "deep/c.csv", "deep/deeper/f.jsonl"]
    assert names(f"{tmp_path}/_*/*") == ["_old/e.jsonl"]
    assert names(f"{tmp_path}/b.jsonl") == names(f"file://{tmp_path}/b.jsonl") == ["b.jsonl"]
    assert names(f"{tmp_path}/g[1].jsonl") == ["g[1].jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("b.jsonl") == names("~/b.jsonl") == names("b*.jsonl") == names("~/b*.jsonl") == ["b.jsonl"]
    with pytest.raises(DataError, match=r"b\*\*: .*`\*\*`"):
        find_files("b**", 0)
    with pytest.raises(BucketError, match=r"/\*\.parket\b.*no file"):
        find_files(f"{tmp_path}/*.parket", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(DataError, match=r"/empty: .*\.jsonl"):
        find_files(str(tmp_path / "empty"), 0)


def test_a_directory_with_brackets_in_its_name_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one[1]/a.jsonl", "one[1]/two?/b.jsonl", "one[1]/twos/c.jsonl", "one1/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(jsonl(ROWS))

    def names(path: str) -> list[str]:
        return [os.path.relpath(file.uri, tmp_path) for file in find_files(path, 0)]

    assert names(f"{tmp_path}/one[1]/*.jsonl") == ["one[1]/a.jsonl"]
    assert names(f"{tmp_path}/one[1]/two?/*") == ["one[1]/two?/b.jsonl"]
    assert names(f"{tmp_path}/one[1]/two*/*") == ["one[1]/two?/b.jsonl", "one[1]/twos/c.jsonl"]
    assert names(f"{tmp_path}/one[12]/*") == ["one1/d.jsonl"]
    monkeypatch.chdir(tmp_path / "one[1]")
    assert names("*.jsonl") == ["one[1]/a.jsonl"]


def test_changed_content_changes_the_version(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1")
    (first,) = find_files(str(path), 0)
    path.write_bytes(b"2")
    (second,) = find_files(str(path), 0)
    assert first.version != second.version


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("hf://datasets/openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("hf://datasets/openai/gsm8k/main", ("openai/gsm8k", "main", "train")),
        ("hf://datasets/openai/gsm8k/main?split=test", ("openai/gsm8k", "main", "test")),
        ("hf://datasets/openai/gsm8k?split=train[50%:]", ("openai/gsm8k", None, "train[50%:]")),
    ],
)
def test_hub_uris_are_parsed(uri: str, parts: tuple[str, str | None, str]):
    assert is_hub_dataset(uri)
    assert parse_hub_uri(uri) == parts


@pytest.mark.parametrize(
    ("uri", "form"),
    [
        ("hf://datasets/gsm8k", "hf://datasets/ORG/NAME"),
        ("hf://datasets/a/b/c/d", "hf://datasets/ORG/NAME"),
        ("hf://datasets/a/b?rows=3", "split="),
        ("hf://datasets/a/b?split=", "split="),
    ],
)
def test_invalid_hub_uris_raise_an_error_with_the_valid_form(uri: str, form: str):
    with pytest.raises(DataError) as caught:
        parse_hub_uri(uri)
    assert_names(str(caught.value), uri, form)


def test_json_array_in_a_jsonl_file_is_read(tmp_path: Path):
    rows = [{"text": "a"}, {"text": "b"}]
    for name, content in (
        ("array.jsonl", "\ufeff \n" + json.dumps(rows, indent=1)),
        ("lines.jsonl", '{"text": "a"}\n'),
    ):
        (tmp_path / name).write_text(content, "utf-8")
    assert read(tmp_path / "array.jsonl") == [(1, rows[0]), (2, rows[1])]
    assert read(tmp_path / "lines.jsonl") == [(1, rows[0])]


def test_file_with_a_bracket_in_its_name_is_no_pattern(tmp_path: Path):
    for name in ("rows[1].jsonl", "rows1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [Path(file.uri).name for file in find_files(str(tmp_path / "rows[1].jsonl"), 0)] == [
        "rows[1].jsonl"
    ]
    assert [Path(file.uri).name for file in find_files(str(tmp_path / "rows[12].jsonl"), 0)] == [
        "rows1.jsonl"
    ]


def test_saved_dataset_is_read_without_its_description(tmp_path: Path):
    """As `Dataset.save_to_disk` writes it: Arrow streams beside JSON files."""
    rows = [
        {"prompt": "2026-11-29", "completion": "3", "id": 2**60 + 1},
        {"prompt": "b", "completion": "c", "id": 4},
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (file,) = find_files(str(tmp_path / "saved"), 0)
    assert file.uri.endswith(".arrow")
    assert read(Path(file.uri)) == [(1, rows[0]), (2, rows[1])]


def test_numbers_of_classes_are_read_with_their_names(tmp_path: Path):
    """The names are in the metadata of Arrow and Parquet files that `datasets` writes."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    dataset = Dataset.from_list([{"text": "fine", "label": 1}, {"text": "?", "label": -1}], features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    (arrow,) = find_files(str(tmp_path / "saved"), 0)
    for path in (Path(arrow.uri), tmp_path / "rows.parquet"):
        named, unknown = (row["label"] for _, row in read(path))
        assert (named, named.name, unknown) == (1, "good", -1)
        assert not hasattr(unknown, "name")


def test_a_saved_dict_of_datasets_is_read_by_the_folders_of_its_splits(tmp_path: Path):
    """As `DatasetDict.save_to_disk` writes it."""
    rows = [{"prompt": "a", "completion": "b"}]
    folder = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(str(folder))
    with pytest.raises(DataError, match=f"such as {folder}/train;"):
        find_files(str(folder), 0)
    arrow = [str(path) for path in (folder / "train").glob("*.arrow")]
    for path in ("train", "train/*", "*/data*", "train/**/*"):
        assert arrow[0] in [file.uri for file in find_files(f"{folder}/{path}", 0)]
        assert all(file.uri.endswith(".arrow") for file in find_files(f"{folder}/{path}", 0))
    states = tmp_path / "states"
    states.mkdir()
    (states / "state.json").write_text("[]")
    assert len(find_files(f"{states}/*.json", 0)) == 1, "a pattern of descriptions alone says what is meant"


@pytest.mark.parametrize(
    ("names", "are_mixed"),
    [
        (("train.jsonl", "test.jsonl"), True),
        (("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"), True),
        (("train/a.jsonl", "dev/a.jsonl"), True),
        (("data.jsonl", "eval_data.jsonl"), True),
        (("a_train.jsonl", "a_holdout.jsonl"), True),
        (("a.jsonl", "a.held_out.jsonl"), True),
        (("evaluation.jsonl", "test.jsonl"), True),
        (("data/Train-1.jsonl", "data/test-1.jsonl"), True),
        (("parts/train-v2/a/a.jsonl", "parts/test/a.jsonl"), True),
        (("train-00000.jsonl", "train-00001.jsonl"), False),
        (("val.jsonl", "validation.jsonl"), False),
        (("a.jsonl", "train.jsonl"), False),
        (("trains.jsonl", "latest.jsonl", "contest.jsonl"), False),
    ],
)
def test_directory_with_files_of_several_splits_raises_an_error(
    names: tuple[str, ...], are_mixed: bool, tmp_path: Path
):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    if not are_mixed:
        assert len(find_files(str(tmp_path), 0)) == len(names)
        return
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path), 0)
    assert_names(str(caught.value), *names)
    advised = str(caught.value).partition("such as ")[2].partition(";")[0]
    assert [file.uri for file in find_files(advised, 0)] == [str(tmp_path / names[0])]
    assert len(find_files(f"{tmp_path}/**/*", 0)) == len(names), "a pattern says what is meant"


@pytest.mark.parametrize("root", ["s3://acme-training/x", "s3://b/test/dev-sets", "/data/eval/x", "."])
@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("train.jsonl", "test.jsonl"), ("test.jsonl",)),
        (("train/a.jsonl", "test/a.jsonl"), ("test/a.jsonl",)),
        (("a.jsonl", "b/val.jsonl"), ("b/val.jsonl",)),
        (("test-1.jsonl", "test-2.jsonl"), ()),
        (("train-1.jsonl", "train-2.jsonl"), ()),
    ],
)
def test_files_of_other_splits_are_found_by_their_names_below_the_common_directory(
    root: str, names: tuple[str, ...], others: tuple[str, ...]
):
    uris = [f"{root}/{name}" for name in names]
    assert files_of_other_splits(uris) == [f"{root}/{name}" for name in others]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}'])
def test_a_key_that_stands_twice_in_an_object_is_rejected(text: str, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(f'{text}\n{{"c": 3}}\n')
    (tmp_path / "rows.json").write_text(f'[{text},\n {{"c": 3}}]')
    for name in ("rows.jsonl", "rows.json"):
        (first, fault), second = read(tmp_path / name)
        assert (first, second) == (1, (2, {"c": 3}))
        assert_names(str(fault), "`a`", "twice")


EXACT = [
    {
        "messages": [
            {"role": "user", "content": "When?"},
            {"role": "tool", "content": {"id": 2**53 + 1, "day": "2026-11-29", "seats": 3, "none": None}},
            {"role": "assistant", "content": "2026-11-29"},
        ]
    },
    {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]},
]
"""Rows whose values have different types, which `datasets` stores as JSON texts."""


@pytest.mark.parametrize("name", ["saved", "a.parquet"])
def test_values_of_mixed_types_are_read_from_tables_as_they_are(tmp_path: Path, name: str):
    (tmp_path / "a.jsonl").write_bytes(jsonl(EXACT))
    dataset = Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    if name == "saved":
        dataset.save_to_disk(tmp_path / name)
    else:
        dataset.to_parquet(tmp_path / name)
    (file,) = find_files(str(tmp_path / name), 0)
    assert [row for _, row in open_file(file, tmp_path / "node").rows] == EXACT


def test_json_columns_are_decoded_wherever_they_stand(tmp_path: Path):
    objects = pa.StructArray.from_arrays([pa.array(["9007199254740993"], pa.json_())], ["b"])
    table = pa.table(
        {
            "whole": pa.array(['{"a": 3}', None], pa.json_()),
            "inside": pa.ListArray.from_arrays(pa.array([0, None, 1], pa.int32()), objects),
            "text": ["3", '{"a": 3}'],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == [
        {"whole": {"a": 3}, "inside": [{"b": 2**53 + 1}], "text": "3"},
        {"whole": None, "inside": None, "text": '{"a": 3}'},
    ]
    pq.write_table(pa.table({"whole": pa.array(["{3", "4"], pa.json_())}), tmp_path / "b.parquet")
    assert [number for number, row in read(tmp_path / "b.parquet") if not isinstance(row, RowError)] == [2]
    assert_names(reasons(tmp_path / "b.parquet")[1], "`whole`", "JSON")


def test_maps_are_read_as_dictionaries(tmp_path: Path):
    """Spark turns Python's dictionaries into maps."""
    messages = pa.list_(pa.map_(pa.string(), pa.string()))
    chats = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}], [{}], None]
    maps = [chat and [list(message.items()) for message in chat] for chat in chats]
    pq.write_table(pa.table({"messages": pa.array(maps, messages)}), tmp_path / "a.parquet")
    assert [row["messages"] for _, row in read(tmp_path / "a.parquet")] == chats
    twice = [[("role", "user"), ("role", "system")]]
    pq.write_table(pa.table({"messages": pa.array([twice, maps[0]], messages)}), tmp_path / "b.parquet")
    assert [number for number, row in read(tmp_path / "b.parquet") if not isinstance(row, RowError)] == [2]
    assert_names(reasons(tmp_path / "b.parquet")[1], "`role` twice")
    of_json = pa.MapArray.from_arrays([0, 1], ["a"], pa.array(["[3]"], pa.json_()))
    pq.write_table(pa.table({"tools": of_json}), tmp_path / "c.parquet")
    assert [row["tools"] for _, row in read(tmp_path / "c.parquet")] == [{"a": [3]}]


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ("train[1:]", [("train", 1, 10)]),
        ("train[50%:]+test[:1]", [("train", 5, 10), ("test", 0, 1)]),
        ("test[-2:]", [("test", 2, 4)]),
    ],
)
def test_parts_of_a_split_are_those_of_datasets(split: str, parts: list[tuple[str, int, int]]):
    assert parts_of(split, {"train": 10, "test": 4}) == parts
