"""Rows that are prepared in shards are those of one pass, with the same order, faults and summary, and the driver receives only counts."""

import gzip
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.messages import assert_names
from tests.support.prepared import prepare, request, rows_of
from training.data import shards
from training.data.errors import DataError
from training.data.prepare import ShardJoiner
from training.data.prepared import (
    SKIPPED_FILE,
    SUMMARY_FILE,
    data_files,
    fetch_prepared,
    keep_prepared,
    verify_prepared,
)
from training.data.request import DataRequest
from training.data.row_index import INDEX_FILE
from training.data.shards import cut, prepare_shards

ROWS = 120


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes shards small enough for the rows of a test."""

    def begin() -> None:
        monkeypatch.setattr(shards, "MIN_BYTES", 8000)
        monkeypatch.setattr(shards, "SHARD_BYTES", 3000)

    return begin


def row(number: int, role: str = "") -> dict[str, Any]:
    turns = [("user", f"{number % 90} + 1?"), ("assistant", f"{number % 90 + 1} " * (number % 11 + 1))]
    messages = [{"role": role or name, "content": text} for name, text in turns]
    return {"messages": messages} | ({"topic": "sums"} if number % 5 == 0 else {})


def write(path: Path, faulty: Sequence[int] = (), rows: int = ROWS) -> Path:
    """Write rows of different lengths, with an empty line after every 17th; those of `faulty`, counted from 1, have an unknown role."""
    lines = []
    for number in range(1, rows + 1):
        lines.append(json.dumps(row(number, "robot" if number in faulty else "")))
        lines.extend([""] if number % 17 == 0 else [])
    path.write_text("\n".join(lines))  # the last line has no end
    return path


def write_parquet(path: Path, faulty: Sequence[int] = ()) -> Path:
    """Write rows in groups of 20."""
    rows = [
        row(number, "robot" if number in faulty else "") | {"topic": None} for number in range(1, ROWS + 1)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=20, compression="none", use_dictionary=False
    )
    return path


def write_compressed(path: Path) -> Path:
    path.write_bytes(gzip.compress(write(path.with_suffix("")).read_bytes()))
    path.with_suffix("").unlink()
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Write a file of each kind, some with faulty rows; they have several shards each, except for the compressed one."""
    return {
        "lines": write(tmp_path / "a.jsonl", faulty=(5, 60, 61)),
        "groups": write_parquet(tmp_path / "b.parquet", faulty=(77,)),
        "compressed": write_compressed(tmp_path / "c.jsonl.gz"),
        "other lines": write(tmp_path / "d.jsonl"),
    }


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["lines"], {}),
        (["groups"], {}),
        (["lines", "groups", "compressed", "other lines"], {}),
        (["lines", "groups"], {"long_rows": "drop", "context_length": 36, "share": (0.1, 1.0)}),
        (["other lines", "lines"], {"weights": (1.0, 2.0), "ignore_columns": ("topic",)}),
    ],
    ids=lambda value: " ".join(value),
)
def test_shards_have_the_rows_of_one_pass(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    sources: dict[str, Path],
    small_shards: Callable[[], None],
    names: list[str],
    changes: dict[str, Any],
):
    data = request(*(sources[name] for name in names), bad_rows="skip", **changes)
    once = prepare(data, chatml, tiny_model, tmp_path / "once")
    small_shards()
    assert len(cut(data)) > 3 * len(set(names) - {"compressed"})
    sharded = prepare(data, chatml, tiny_model, tmp_path / "sharded")
    assert len(data_files(sharded.directory)) == len(cut(data))
    assert sharded.key == once.key
    assert rows_of(sharded) == rows_of(once)
    assert np.array_equal(sharded.index.digest, once.index.digest)
    assert np.array_equal(sharded.index.position, once.index.position)
    assert replace(sharded.summary, fingerprint="") == replace(once.summary, fingerprint="")
    assert (sharded.directory / SKIPPED_FILE).read_text() == (once.directory / SKIPPED_FILE).read_text()
    assert once.summary.skipped_rows
    verify_prepared(sharded)


def test_files_of_shards_do_not_depend_on_the_number_of_processes(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    sources: dict[str, Path],
    small_shards: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
):
    small_shards()
    data = request(*sources.values(), bad_rows="skip")

    def files(cores: int) -> dict[str, bytes]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        prepared = prepare(data, chatml, tiny_model, tmp_path / str(cores))
        return {path.name: path.read_bytes() for path in prepared.directory.iterdir()}

    several = files(2)
    assert several == files(1)
    assert several.keys() > {INDEX_FILE, SKIPPED_FILE, SUMMARY_FILE, "data-00000.arrow", "data-00001.arrow"}


def error_of(data: DataRequest, tokenizer: PreTrainedTokenizerFast, model: Path, cache: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, model, cache)
    return str(caught.value)


def test_faults_of_shards_are_reported_as_those_of_one_pass(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    sources: dict[str, Path],
    small_shards: Callable[[], None],
):
    """The first fault of this file is in its third shard."""
    data = request(write(tmp_path / "faulty.jsonl", faulty=(60, 61, 99)), sources["groups"])

    once = error_of(data, chatml, tiny_model, tmp_path / "once")
    small_shards()
    begins = [shard.pieces[0] for shard in cut(data)]
    text = (tmp_path / "faulty.jsonl").read_text()
    assert begins[2].begin < text.index("robot") < (begins[2].end or 0)
    assert error_of(data, chatml, tiny_model, tmp_path / "sharded") == once
    assert_names(once, "4 of 240 rows", f"{tmp_path}/faulty.jsonl:63: ", "robot", "3 more rows")
    assert [path.suffix for path in (tmp_path / "sharded" / "prepared").iterdir()] == [".lock"]


def test_long_rows_of_shards_are_reported_as_those_of_one_pass(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, small_shards: Callable[[], None]
):
    rows = [row(number) for number in range(200)]
    for number in (150, 180):
        rows[number]["messages"][1]["content"] = "7 " * 500
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = request(path, context_length=300, long_rows="error")

    once = error_of(data, chatml, tiny_model, tmp_path / "once")
    small_shards()
    assert error_of(data, chatml, tiny_model, tmp_path / "sharded") == once
    assert_names(once, f"{path}:151: ", f"{path}:181: ")


def test_the_first_known_format_of_a_source_counts_for_all_its_shards(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, small_shards: Callable[[], None]
):
    """The rows of the first shards have no format, and the last ones another than those before them."""
    rows = [*[{"topic": f"{n}" * 50} for n in range(100)], *[row(n) for n in range(60)]]
    rows += [{"prompt": f"{n} + 1?", "completion": f"{n + 1}" * 20} for n in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = request(path, bad_rows="skip")
    once = prepare(data, chatml, tiny_model, tmp_path / "once")
    small_shards()
    sharded = prepare(data, chatml, tiny_model, tmp_path / "sharded")
    assert replace(sharded.summary, fingerprint="") == replace(once.summary, fingerprint="")
    assert sharded.summary.skipped_rows == {"wrong columns": 100, "mixed formats": 60}
    assert (sharded.directory / SKIPPED_FILE).read_text() == (once.directory / SKIPPED_FILE).read_text()


def test_lines_are_read_once_wherever_a_shard_ends(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    small_shards: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
):
    """One line is longer than several shards; with each size, some shards end before, at or after a line's end."""
    rows = [row(number) for number in range(40)]
    rows[20]["messages"][1]["content"] = "9 " * 1000
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(each).encode() + b"\r\n" for each in rows))
    once = rows_of(prepare(request(path), chatml, tiny_model, tmp_path / "once"))
    small_shards()
    monkeypatch.setattr(shards, "MIN_BYTES", 0)
    line = len(json.dumps(rows[0])) + 2
    for size in (line - 1, line, line + 1, 500):
        monkeypatch.setattr(shards, "SHARD_BYTES", size)
        sharded = prepare(request(path), chatml, tiny_model, tmp_path / str(size))
        assert rows_of(sharded) == once, size


def test_array_under_the_name_of_json_lines_is_read_once(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, small_shards: Callable[[], None]
):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([row(number) for number in range(ROWS)], indent=1))
    once = prepare(request(path), chatml, tiny_model, tmp_path / "once")
    small_shards()
    sharded = prepare(request(path), chatml, tiny_model, tmp_path / "sharded")
    assert len(data_files(sharded.directory)) > 3
    assert rows_of(sharded) == rows_of(once)


def test_sources_that_cannot_be_cut_are_prepared_in_one_pass(
    tmp_path: Path,
    sources: dict[str, Path],
    small_shards: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
):
    small_shards()
    assert cut(request(sources["lines"], max_rows=100)) == []
    csv = tmp_path / "large.csv"
    csv.write_text("prompt,completion\n" + "1,2\n" * 3000)
    assert cut(request(sources["lines"], csv)) == []
    monkeypatch.setattr(shards, "MIN_BYTES", 10**6)
    assert cut(request(sources["lines"])) == []


def test_prepared_shards_are_read_from_the_bucket(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    sources: dict[str, Path],
    small_shards: Callable[[], None],
):
    small_shards()
    data, bucket = request(sources["other lines"]), str(tmp_path / "bucket" / "prepared")
    first = prepare(data, chatml, tiny_model, tmp_path / "driver")
    keep_prepared(first, bucket)
    on_worker = fetch_prepared(first.key, tmp_path / "worker", bucket)
    assert rows_of(on_worker) == rows_of(first)
    verify_prepared(on_worker)
    damaged = data_files(first.directory)[1]
    damaged.write_bytes(damaged.read_bytes()[:-50] + bytes(50))
    with pytest.raises(DataError, match=rf"corrupt.*{first.key}"):
        verify_prepared(first)


def test_schema_is_only_looked_for_if_another_shard_of_the_source_follows(
    chatml: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "MIN_BYTES", 1000)
    paths = [write(tmp_path / f"{number}.jsonl", rows=rows) for number, rows in enumerate((20, 20, 80))]
    monkeypatch.setattr(shards, "SHARD_BYTES", paths[0].stat().st_size + 1)
    (tmp_path / "output").mkdir()
    data = request(*paths)
    worker = shards.ShardWorker(data, chatml, str(tmp_path / "output"), tmp_path / "cache")
    looked: list[int] = []

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        looked.extend(item.source for item in items if function.__name__ == "find_schema")
        yield from map(function, items)

    prepared = prepare_shards(worker, cut(data), run, lambda rows, fraction: None)
    assert prepared.tally.rows == 120
    assert looked == [2]


def test_messages_to_the_driver_do_not_grow_with_the_rows(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Four times the rows in as many shards return as many bytes."""
    monkeypatch.setattr(shards, "MIN_BYTES", 1000)

    def received(rows: int) -> tuple[int, int]:
        path = write(tmp_path / f"{rows}.jsonl", rows=rows)
        monkeypatch.setattr(shards, "SHARD_BYTES", path.stat().st_size // 4 + 1)
        output = tmp_path / f"output-{rows}"
        output.mkdir()
        data = request(path)
        worker = ShardJoiner(data, chatml, str(output), tmp_path / "cache")
        sizes = []

        def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            for item in items:
                result = function(item)
                sizes.append(len(pickle.dumps(result)))
                yield result

        prepared = prepare_shards(worker, cut(data), run, lambda rows, fraction: None)
        assert prepared.tally.rows == rows
        (summary,) = run(worker.join, [prepared])
        assert summary.rows == rows
        return len(sizes), sum(sizes)

    (calls, few), (more_calls, many) = received(400), received(1600)
    assert calls == more_calls == 6
    assert few < 10_000
    assert many < 1.5 * few, "the examples are longer"
