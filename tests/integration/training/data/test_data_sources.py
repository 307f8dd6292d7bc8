"""Rows from where people keep them: a real S3 server, and what speaks the hub's protocol."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.front_door import run_main_quickly
from tests.support.hub import COMMIT, hub_of
from tests.support.jobs import Finished, run_main, write_yaml
from tests.support.messages import assert_names
from tests.support.prepared import prepare, request, rows_of
from training.data.errors import DataError
from training.data.prepare import prepare_data
from training.data.prepared import fetch_prepared, keep_prepared
from training.data.sources import find_files
from utils.storage.bucket import NotFoundError, open_store


def lines(*answers: str) -> bytes:
    return "".join(
        json.dumps({"prompt": f"What is {answer}?", "completion": answer}) + "\n" for answer in answers
    ).encode()


def put(uri: str, objects: dict[str, bytes], directory: Path) -> None:
    for key, content in objects.items():
        path = directory / "object"
        path.write_bytes(content)
        open_store(uri).upload(path, key)


OBJECTS = {
    "rows/a.jsonl": lines("one", "two", "three"),
    "rows/deep/er/b.jsonl.gz": gzip.compress(lines("four")),
    "rows/notes.md": b"# Notes",
    "rows/_SUCCESS": b"",
    "rows/_temporary/c.jsonl": lines("five"),
    "rows-of-others/d.jsonl": lines("six"),
    "day-1/e.csv": b"prompt,completion\nWhat is seven?,seven\n",
    "day-2/e.csv": b"prompt,completion\nWhat is eight?,eight\n",
}


@pytest.fixture
def home(bucket_uri: str, tmp_path: Path) -> str:
    put(bucket_uri, OBJECTS, tmp_path)
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
        ("rows/_temporary/*", ["rows/_temporary/c.jsonl"]),
    ],
)
def test_objects_a_prefix_and_a_glob(home: str, path: str, found: list[str]):
    files = find_files(f"{home}/{path}", 0)
    assert [file.uri for file in files] == [f"{home}/{key}" for key in found]


def test_a_missing_object_raises_an_error_with_the_uri(home: str):
    for path, fact in {"rows/*.parquet": f" {home}/rows", "row": "no such object"}.items():
        with pytest.raises(NotFoundError) as missing:
            find_files(f"{home}/{path}", 0)
        assert str(missing.value).startswith(f"{home}/{path}: ")
        assert_names(str(missing.value), fact)
    with pytest.raises(DataError, match=r"bucket.* pattern"):
        find_files("s3://b*/rows.jsonl", 0)


def test_another_object_under_the_same_key_is_another_version(home: str, tmp_path: Path):
    (before,) = find_files(f"{home}/rows/a.jsonl", 0)
    assert find_files(f"{home}/rows/a.jsonl", 0) == [before]
    put(home, {"rows/a.jsonl": lines("one", "two", "seven")}, tmp_path)
    (after,) = find_files(f"{home}/rows/a.jsonl", 0)
    assert after.version != before.version


def test_rows_are_named_by_their_object(
    home: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    put(home, {"rows/z.jsonl": lines("nine") + b"{bad\n"}, tmp_path)
    data = request(f"{home}/rows", f"{home}/day-*/*.csv")
    with pytest.raises(DataError, match=rf"{home}/rows/z\.jsonl:2: .*JSON"):
        prepare(data, tokenizer, tiny_model, tmp_path / "cache")


def test_sources_in_a_bucket_are_mixed_by_weight(
    home: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    sources = (f"{home}/rows", f"{home}/day-*/*.csv", f"{home}/rows-of-others/d.jsonl")
    data = request(*sources, weights=(4.0, 2.0, 1.0))
    prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [(source.rows, source.taken) for source in prepared.summary.sources] == [(4, 4), (2, 2), (1, 1)]
    data = request(*sources, weights=(1.0, 1.0, 5.0))
    mixed = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
    assert [(source.rows, source.taken) for source in mixed.summary.sources] == [(4, 1), (2, 1), (1, 5)]
    places = [mixed.place(row) for row in range(len(rows_of(mixed)))]
    assert places[2:] == [f"{home}/rows-of-others/d.jsonl:1"] * 5
    assert places[0].startswith(f"{home}/rows/")
    assert places[1].startswith(f"{home}/day-")


def test_prepared_rows_are_kept_in_the_bucket(
    home: str, tokenizer: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    """Another driver reads no rows, and another node gets their tokens."""
    bucket, data = f"{home}/prepared", request(f"{home}/rows")
    first = prepare_data(data, tokenizer, tiny_model, tmp_path / "driver", bucket=bucket)
    keep_prepared(first, bucket)
    again = prepare_data(data, tokenizer, tiny_model, tmp_path / "another", bucket=bucket)
    assert again.summary == first.summary
    assert not (tmp_path / "another" / "data").exists()
    assert rows_of(fetch_prepared(first.key, tmp_path / "worker", bucket)) == rows_of(first)
    put(home, {"rows/a.jsonl": lines("one")}, tmp_path)
    changed = prepare_data(
        request(f"{home}/rows"), tokenizer, tiny_model, tmp_path / "another", bucket=bucket
    )
    assert changed.summary.rows == 2


def dry_run(directory: Path, tiny_model: Path, **settings: Any) -> Finished:
    plain = {"model_id": str(tiny_model), "device": "cpu", "output_dir": str(directory / "scratch")}
    config = write_yaml(directory / "config.yaml", plain | settings)
    return run_main_quickly(config, "--dry-run", "--json")


def test_the_plan_names_each_source(home: str, tiny_model: Path, tmp_path: Path):
    finished = dry_run(
        tmp_path,
        tiny_model,
        train_path=[{"path": f"{home}/rows", "weight": 3}, {"path": f"{home}/day-*/*.csv", "weight": 3}],
        valid_path=f"{home}/rows-of-others",
        storage_path=f"{home}/runs",
    )
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train"]["sources"] == [
        {"path": f"{home}/rows", "format": "prompt_completion", "files": 2, "rows": 4, "taken": 3},
        {"path": f"{home}/day-*/*.csv", "format": "prompt_completion", "files": 2, "rows": 2, "taken": 3},
    ]
    assert finished.result["valid"]["rows"] == 1
    (tmp_path / "other").mkdir()
    nothing = dry_run(
        tmp_path / "other", tiny_model, train_path=f"{home}/rows/*.parket", storage_path=f"{home}/runs"
    )
    assert nothing.exit_code == 2
    assert_names(nothing.errors, f"error: train_path: {home}/rows/*.parket: ", "no file")


def test_a_dataset_of_the_hub(tiny_model: Path, tmp_path: Path):
    """As it is served, again from what the first time left here, and where nothing answers."""
    settings = {
        "model_id": str(tiny_model),
        "train_path": "hf://datasets/org/rows?split=train[1:]",
        "device": "cpu",
        "storage_path": str(tmp_path / "runs"),
        "output_dir": str(tmp_path / "scratch"),
    }
    config = write_yaml(tmp_path / "config.yaml", settings)
    cache = {"HF_HOME": str(tmp_path / "hub")}
    with hub_of("org/rows", {"train.jsonl": lines("one", "two", "three")}) as endpoint:
        online = cache | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        first = run_main(config, "--dry-run", "--json", variables=online)
    assert first.exit_code == 0, first.errors
    assert (first.result["train"]["rows"], first.result["train"]["files"]) == (2, [settings["train_path"]])
    assert COMMIT in {path.name for path in (tmp_path / "hub").rglob("*")}
    again = run_main(config, "--dry-run", "--json", variables=cache | {"HF_HUB_OFFLINE": "1"})
    assert again.exit_code == 0, again.errors
    assert again.result["train"] == first.result["train"]
    gone = run_main(config, "--dry-run", variables=online)
    assert gone.exit_code == 2
    assert "Traceback" not in gone.errors
    assert_names(gone.errors, f"error: {settings['train_path']}: ", "Hugging Face", "HF_HUB_OFFLINE=1")
