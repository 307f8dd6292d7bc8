"""Rows that several processes tokenize are stored as one process stores them, and a killed process leaves nothing behind."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.messages import assert_names
from tests.support.prepared import prepare, request
from training.data import row_pass, token_files
from training.data.chunks import Chunk, ChunkResult, ChunkTokenizer
from training.data.errors import DataError
from training.data.prepared import SKIPPED_FILE, SUMMARY_FILE
from training.data.row_index import DATA_FILE, INDEX_FILE

ROWS = 120


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the CPU cores that the preparation sees; chunks have 7 rows and stored batches 10."""
    cores = [0, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(row_pass, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(token_files, "_BATCH_ROWS", 10)
    return cores


def write(path: Path, faulty: Sequence[int] = ()) -> Path:
    """Write rows of different lengths and kinds; those of `faulty`, counted from 1, have an unknown role."""
    with path.open("w") as file:
        for number in range(1, ROWS + 1):
            turns = [
                ("user", f"{number % 90} + 1?"),
                ("assistant", f"{number % 90 + 1} " * (number % 11 + 1)),
            ]
            role = "robot" if number in faulty else ""
            messages = [{"role": role or name, "content": text} for name, text in turns]
            row: dict[str, Any] = {"messages": messages} | ({"topic": "sums"} if number % 5 == 0 else {})
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bad_rows": "skip", "long_rows": "drop", "context_length": 36, "share": (0.1, 1.0)},
        {"max_rows": 50},
        {"weights": (1.0, 2.0), "ignore_columns": ("topic",)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_files_do_not_depend_on_the_number_of_processes(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    cores: list[int],
    changes: dict[str, Any],
):
    faulty = (5, 60, 61) if changes.get("bad_rows") == "skip" else ()
    data = request(write(tmp_path / "a.jsonl", faulty), write(tmp_path / "b.jsonl"), **changes)

    def files(name: str) -> list[bytes]:
        prepared = prepare(data, chatml, tiny_model, tmp_path / name)
        return [
            (prepared.directory / file).read_bytes()
            for file in (DATA_FILE, INDEX_FILE, SKIPPED_FILE, SUMMARY_FILE)
        ]

    several = files("several")
    cores[:] = [0]
    assert files("one") == several
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_pass, "_CHUNK_ROWS", 1000)
        assert files("at once") == several


def test_faults_are_reported_in_their_order(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, cores: list[int]
):
    path = write(tmp_path / "a.jsonl", faulty=(30, 31, 99))
    with pytest.raises(DataError) as caught:
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    first, shown, *_ = str(caught.value).splitlines()
    assert first.startswith(f"3 of {ROWS} rows ")
    assert_names(shown, f"{path}:30: ", "robot", "2 more rows")
    assert len(cores) == 2


def test_a_killed_process_is_an_error_that_leaves_nothing(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    cores: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    tokenize, parent = ChunkTokenizer.tokenize, os.getpid()

    def tokenize_or_die(tokenizer: ChunkTokenizer, chunk: Chunk) -> ChunkResult:
        if os.getpid() != parent and chunk.stored[0][0] > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize(tokenizer, chunk)

    monkeypatch.setattr(ChunkTokenizer, "tokenize", tokenize_or_die)
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(DataError) as caught:
        prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    assert_names(str(caught.value), str(path), "killed", "memory")
    assert [found.suffix for found in (tmp_path / "cache" / "prepared").iterdir()] == [".lock"]
    assert len(cores) == 2
