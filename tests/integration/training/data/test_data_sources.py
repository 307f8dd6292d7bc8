"""Tests of data sources on a real S3 server and on a local server that speaks the protocol of the Hugging Face hub."""

import csv
import gzip
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.front_door import run_main_quickly
from tests.support.hub import COMMIT, serve_hub
from tests.support.jobs import CompletedCommand, run_main, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_fsspec_bucket, set_up_own_bucket
from tests.support.prepared import prepare, request, rows_of
from training.data.errors import DataError
from training.data.prepare import prepare_data
from training.data.prepared import fetch_prepared, keep_prepared
from training.data.sources import DataFile, Piece, find_files, open_file
from utils.storage.bucket import BucketError, NotFoundError, open_store
from utils.storage.embedded_bucket import EmbeddedBucket


def jsonl(*answers: str) -> bytes:
    """Return prompt and completion rows as JSONL."""
    return "".join(
        json.dumps({"prompt": f"What is {answer}?", "completion": answer}) + "\n" for answer in answers
    ).encode()


def upload_objects(uri: str, objects: dict[str, bytes], directory: Path) -> None:
    for key, content in objects.items():
        path = directory / "object"
        path.write_bytes(content)
        open_store(uri).upload(path, key)


OBJECTS = {
    "rows/a.jsonl": jsonl("one", "two", "three"),
    "rows/deep/er/b.jsonl.gz": gzip.compress(jsonl("four")),
    "rows/notes.md": b"# Notes",
    "rows/_SUCCESS": b"",
    "rows/_temporary/c.jsonl": jsonl("five"),
    "rows-of-others/d.jsonl": jsonl("six"),
    "day-1/e.csv": b"prompt,completion\nWhat is seven?,seven\n",
    "day-2/e.csv": b"prompt,completion\nWhat is eight?,eight\n",
    "one[1]/f.jsonl": jsonl("seven"),
    "one1/g.jsonl": jsonl("eight"),
    "one[1]/deep?/h.jsonl": jsonl("nine"),
    "one[1]/deeper/i.jsonl": jsonl("ten"),
}


@pytest.fixture
def data_uri(bucket_uri: str, tmp_path: Path) -> str:
    """Return the URI of a prefix that contains OBJECTS."""
    upload_objects(bucket_uri, OBJECTS, tmp_path)
    return bucket_uri


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("rows/a.jsonl", ["rows/a.jsonl"]),
        ("rows", ["rows/a.jsonl", "rows/deep/er/b.jsonl.gz"]),
        ("rows/", ["rows/a.jsonl", "rows/deep/er/b.jsonl.gz"]),
        ("rows/*.jsonl", ["rows/a.jsonl"]),
        ("rows/**/*.gz", ["rows/deep/er/b.jsonl.gz"]),
        ("row*/?.jsonl", ["rows-of-others/d.jsonl", "rows/a.jsonl"]),
        ("day-[12]/*", ["day-1/e.csv", "day-2/e.csv"]),
        ("one[1]", ["one[1]/deep?/h.jsonl", "one[1]/deeper/i.jsonl", "one[1]/f.jsonl"]),
        ("one[1]/", ["one[1]/deep?/h.jsonl", "one[1]/deeper/i.jsonl", "one[1]/f.jsonl"]),
        ("one[1]/*.jsonl", ["one[1]/f.jsonl"]),
        ("one[1]/deep?/*", ["one[1]/deep?/h.jsonl"]),
        ("one[1]/deep*/*", ["one[1]/deep?/h.jsonl", "one[1]/deeper/i.jsonl"]),
        ("one[1]/**/[hi].jsonl", ["one[1]/deep?/h.jsonl", "one[1]/deeper/i.jsonl"]),
        ("one[12]/*.jsonl", ["one1/g.jsonl"]),
        ("*/f.jsonl", ["one[1]/f.jsonl"]),
        ("rows/_temporary/*", ["rows/_temporary/c.jsonl"]),
    ],
)
def test_find_files_resolves_objects_prefixes_and_globs(data_uri: str, path: str, found: list[str]):
    files = find_files(f"{data_uri}/{path}", 0)
    assert [file.uri for file in files] == [f"{data_uri}/{key}" for key in found]


def test_missing_object_raises_an_error_with_its_uri(data_uri: str):
    for path, fact in {"rows/*.parquet": f" {data_uri}/rows", "row": "no such object"}.items():
        with pytest.raises(NotFoundError) as missing:
            find_files(f"{data_uri}/{path}", 0)
        assert str(missing.value).startswith(f"{data_uri}/{path}: ")
        assert_names(str(missing.value), fact)
    with pytest.raises(DataError, match=r"bucket.* pattern"):
        find_files("s3://b*/rows.jsonl", 0)


def test_overwritten_object_has_another_version(data_uri: str, tmp_path: Path):
    (before,) = find_files(f"{data_uri}/rows/a.jsonl", 0)
    assert find_files(f"{data_uri}/rows/a.jsonl", 0) == [before]
    upload_objects(data_uri, {"rows/a.jsonl": jsonl("one", "two", "seven")}, tmp_path)
    (after,) = find_files(f"{data_uri}/rows/a.jsonl", 0)
    assert after.version != before.version


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_rows_are_read_from_the_bucket_in_ranges(
    bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str
):
    """Without a copy on this node, pieces of a file and complete compressed files have the rows of a copy."""
    set_up = set_up_own_bucket if scheme == "s3" else set_up_fsspec_bucket
    uri = set_up(monkeypatch, bucket, "ranges")
    rows = [{"prompt": f"What is {number}?", "completion": f"{number} " * 30} for number in range(300)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=50, compression="none")
    parquet = (tmp_path / "c.parquet").read_bytes()
    upload_objects(
        uri, {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.parquet": parquet}, tmp_path
    )

    def read(file: DataFile, cache: Path | None, piece: Piece | None = None) -> list[Any]:
        return [row for _, row in open_file(file, cache, piece).rows]

    monkeypatch.setattr("utils.storage.bucket._RANGE_BYTES", 1000)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        (file,) = find_files(f"{uri}/{name}", 0)
        assert read(file, None) == read(file, tmp_path / "cache") == rows
        if file.is_divisible:
            bounds = [*range(0, file.size, file.size // 5), file.size]
            pieces = [read(file, None, Piece(0, begin, end)) for begin, end in pairwise(bounds)]
            assert [row for piece in pieces for row in piece] == rows
            assert sum(map(bool, pieces)) > 3
    opened = open_file(find_files(f"{uri}/a.jsonl", 0)[0], None)
    (replaced,) = find_files(f"{uri}/a.jsonl", 0)
    next(opened.rows)
    upload_objects(uri, {"a.jsonl": lines.upper()}, tmp_path)
    with pytest.raises(BucketError, match=r"a\.jsonl.*(changed|replaced)"):
        list(opened.rows)
    with pytest.raises(BucketError, match=rf"{uri}/a\.jsonl: .*replaced.*Run the same command"):
        open_file(replaced, None)


def test_invalid_row_raises_an_error_with_object_and_line(
    data_uri: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    upload_objects(data_uri, {"rows/z.jsonl": jsonl("nine") + b"{bad\n"}, tmp_path)
    data = request(f"{data_uri}/rows", f"{data_uri}/day-*/*.csv")
    with pytest.raises(DataError, match=rf"{data_uri}/rows/z\.jsonl:2: .*JSON"):
        prepare(data, tokenizer, tiny_model, tmp_path / "cache")


def test_sources_in_a_bucket_are_mixed_by_weight(
    data_uri: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    sources = (f"{data_uri}/rows", f"{data_uri}/day-*/*.csv", f"{data_uri}/rows-of-others/d.jsonl")
    data = request(*sources, weights=(4.0, 2.0, 1.0))
    prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [(source.rows, source.taken) for source in prepared.summary.sources] == [(4, 4), (2, 2), (1, 1)]
    data = request(*sources, weights=(1.0, 1.0, 5.0))
    mixed = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [(source.rows, source.taken) for source in mixed.summary.sources] == [(4, 1), (2, 1), (1, 5)]
    locations = [mixed.place(row) for row in range(len(rows_of(mixed)))]
    assert locations[2:] == [f"{data_uri}/rows-of-others/d.jsonl:1"] * 5
    assert locations[0].startswith(f"{data_uri}/rows/")
    assert locations[1].startswith(f"{data_uri}/day-")


def test_prepared_rows_are_reused_from_the_bucket(
    data_uri: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    """Another driver reads no source files, and another node fetches the prepared rows."""
    bucket, data = f"{data_uri}/prepared", request(f"{data_uri}/rows")
    first = prepare_data(data, tokenizer, tiny_model, tmp_path / "driver", bucket=bucket)
    keep_prepared(first, bucket)
    repeated = prepare_data(data, tokenizer, tiny_model, tmp_path / "another", bucket=bucket)
    assert repeated.summary == first.summary
    assert not (tmp_path / "another" / "data").exists()
    assert rows_of(fetch_prepared(first.key, tmp_path / "worker", bucket)) == rows_of(first)
    upload_objects(data_uri, {"rows/a.jsonl": jsonl("one")}, tmp_path)
    changed = prepare_data(
        request(f"{data_uri}/rows"), tokenizer, tiny_model, tmp_path / "another", bucket=bucket
    )
    assert changed.summary.rows == 2


def dry_run(directory: Path, tiny_model: Path, **settings: Any) -> CompletedCommand:
    defaults = {"model_id": str(tiny_model), "device": "cpu", "output_dir": str(directory / "scratch")}
    config = write_yaml(directory / "config.yaml", defaults | settings)
    return run_main_quickly(config, "--dry-run", "--json")


def test_plan_reports_the_rows_of_each_source(data_uri: str, tiny_model: Path, tmp_path: Path):
    finished = dry_run(
        tmp_path,
        tiny_model,
        train_path=[
            {"path": f"{data_uri}/rows", "weight": 3},
            {"path": f"{data_uri}/day-*/*.csv", "weight": 3},
        ],
        valid_path=f"{data_uri}/rows-of-others",
        storage_path=f"{data_uri}/runs",
    )
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train"]["sources"] == [
        {"path": f"{data_uri}/rows", "format": "prompt_completion", "files": 2, "rows": 4, "taken": 3},
        {
            "path": f"{data_uri}/day-*/*.csv",
            "format": "prompt_completion",
            "files": 2,
            "rows": 2,
            "taken": 3,
        },
    ]
    assert finished.result["valid"]["rows"] == 1
    (tmp_path / "other").mkdir()
    no_match = dry_run(
        tmp_path / "other",
        tiny_model,
        train_path=f"{data_uri}/rows/*.parket",
        storage_path=f"{data_uri}/runs",
    )
    assert no_match.exit_code == 2
    assert_names(no_match.errors, f"error: train_path: {data_uri}/rows/*.parket: ", "no file")


CALLS = [
    {"day": "2026-11-29", "id": 2**53 + 1, "seats": 3},
    {"day": "2026-11-30", "id": 0.5, "seats": 3.5},
    {"day": "2026-12-01", "id": 5, "seats": 4},
]
"""Arguments of calls, of which a column of one type would change dates, whole and large numbers."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calls() -> bytes:
    """Return answers with calls as JSONL."""
    lines = []
    for arguments in CALLS:
        call = {"type": "function", "function": {"name": "book", "arguments": arguments}}
        answer = {"role": "assistant", "content": "Yes.", "tool_calls": [call]}
        lines.append(json.dumps({"prompt": "Book it.", "completion": [answer]}) + "\n")
    return "".join(lines).encode()


@pytest.mark.slow
def test_json_files_on_the_hub_keep_dates_and_numbers(
    tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    """Online and then from the cache, the tokens equal those of the same file on disk; other splits are not fetched."""
    (tmp_path / "rows.jsonl").write_bytes(calls())
    tokenizer.chat_template = TEMPLATE
    local = prepare(request(tmp_path / "rows.jsonl"), tokenizer, tiny_model, tmp_path / "cache").summary
    settings = {
        "model_id": str(tiny_model),
        "train_path": "hf://datasets/org/rows?split=train[1:]",
        "device": "cpu",
        "storage_path": str(tmp_path / "runs"),
        "output_dir": str(tmp_path / "scratch"),
        "chat_template": TEMPLATE,
    }
    cache = {"HF_HOME": str(tmp_path / "hub")}
    files = {"train.jsonl.gz": gzip.compress(calls(), mtime=0), "test.jsonl": jsonl("one")}
    config = write_yaml(tmp_path / "config.yaml", settings)
    with serve_hub("org/rows", files) as endpoint:
        online = cache | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        first = run_main(config, "--dry-run", "--json", variables=online)
    assert first.exit_code == 0, first.errors
    write_yaml(config, {**settings, "context_length": 128})  # so that the rows are read again
    cached = run_main(config, "--dry-run", "--json", variables=cache | {"HF_HUB_OFFLINE": "1"})
    assert cached.exit_code == 0, cached.errors
    expected = [[list(piece) for piece in example] for example in local.examples]
    assert first.result["train"]["examples"] == cached.result["train"]["examples"] == expected[1:]
    text = "".join(piece for example in local.examples for piece, _ in example)
    assert_names(text, *(json.dumps(arguments) for arguments in CALLS))
    assert not any(path.name == "test.jsonl" for path in (tmp_path / "hub").rglob("*"))


TABLE = [
    {"prompt": "Which day?", "completion": "2026-11-29"},
    {"prompt": "Which id?", "completion": "9007199254740993"},
    {"prompt": "How many?", "completion": "3.0"},
    {"prompt": 'Say "NA".', "completion": "NA"},
]
"""Cells that pandas turns into datetimes, numbers and missing values."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "separator"), [("train.tsv", "\t"), ("train.csv", ",")])
def test_tables_on_the_hub_keep_the_texts_of_their_cells(
    name: str, separator: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=separator)
    writer.writeheader()
    writer.writerows(TABLE)
    (tmp_path / name).write_text(text.getvalue())
    settings = {
        "model_id": str(tiny_model),
        "train_path": "hf://datasets/org/rows",
        "device": "cpu",
        "storage_path": str(tmp_path / "runs"),
        "output_dir": str(tmp_path / "scratch"),
    }
    config = write_yaml(tmp_path / "config.yaml", settings)
    with serve_hub("org/rows", {name: text.getvalue().encode()}) as endpoint:
        variables = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        finished = run_main(config, "--dry-run", "--json", variables=variables)
    assert finished.exit_code == 0, finished.errors
    local = prepare(request(tmp_path / name), tokenizer, tiny_model, tmp_path / "cache").summary
    assert finished.result["train"]["rows"] == len(TABLE)
    assert finished.result["train"]["trained_tokens"] == local.trained_tokens
    assert finished.result["train"]["examples"] == [
        [list(piece) for piece in example] for example in local.examples
    ]


@pytest.mark.slow
def test_hub_dataset_is_read_online_and_then_from_the_cache(tiny_model: Path, tmp_path: Path):
    """If the hub is unreachable, the error advises HF_HUB_OFFLINE=1, which reads the cache."""
    settings = {
        "model_id": str(tiny_model),
        "train_path": "hf://datasets/org/rows?split=train[1:]",
        "device": "cpu",
        "storage_path": str(tmp_path / "runs"),
        "output_dir": str(tmp_path / "scratch"),
    }
    config = write_yaml(tmp_path / "config.yaml", settings)
    cache = {"HF_HOME": str(tmp_path / "hub")}
    with serve_hub("org/rows", {"train.jsonl": jsonl("one", "two", "three")}) as endpoint:
        online = cache | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        first = run_main(config, "--dry-run", "--json", variables=online)
    assert first.exit_code == 0, first.errors
    assert (first.result["train"]["rows"], first.result["train"]["files"]) == (2, [settings["train_path"]])
    assert COMMIT in {path.name for path in (tmp_path / "hub").rglob("*")}
    cached = run_main(config, "--dry-run", "--json", variables=cache | {"HF_HUB_OFFLINE": "1"})
    assert cached.exit_code == 0, cached.errors
    assert cached.result["train"] == first.result["train"]
    unreachable = run_main(config, "--dry-run", variables=online)
    assert unreachable.exit_code == 2
    assert "Traceback" not in unreachable.errors
    assert_names(unreachable.errors, f"error: {settings['train_path']}: ", "Hugging Face", "HF_HUB_OFFLINE=1")
