import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.prepared import prepare, request
from tests.support.tiny_model import write_data
from training.data.batches import BatchPlan, BatchShape
from training.data.prepared import PreparedData
from training.data.report import (
    DataReport,
    describe_loss,
    describe_rows,
    key_figures,
    make_report,
    measure_indexes,
)
from training.data.report_page import to_html


def report_of(train: PreparedData, valid: PreparedData | None = None, **changes: Any) -> DataReport:
    plan = BatchPlan(BatchShape(train.summary.rows, 4, 2, 1), 42, lengths=changes.pop("lengths", None))
    figures = measure_indexes(train, [valid] if valid else [], plan, changes.pop("padded_to", None))
    settings: dict[str, Any] = {"limit": None, "steps": 7, "more_valid": {}} | changes
    return make_report(train, valid, figures, **settings)


def test_padding_waste_is_the_share_of_padding_in_the_batches(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path, _ = write_data(tmp_path, train_rows=42)
    train = prepare(request(path), chatml, tiny_model, tmp_path / "cache")
    lengths = train.index.length
    order = BatchPlan(BatchShape(42, 4, 2, 1), 42).epoch(0)
    batches = [lengths[order[begin : begin + 4]] for begin in range(0, 42, 4)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert report_of(train).padding_waste == pytest.approx(1 - lengths.sum() / padded)
    assert report_of(train, padded_to=100).padding_waste == pytest.approx(1 - lengths.sum() / (42 * 100))
    assert report_of(train, lengths=lengths).padding_waste < report_of(train).padding_waste


def test_validation_rows_that_repeat_training_rows_are_listed(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train_file, valid_file = write_data(tmp_path)
    lines = train_file.read_text().splitlines(keepends=True)
    with valid_file.open("a") as file:
        file.writelines([lines[6], lines[2]])
    train, valid = (
        prepare(request(path), chatml, tiny_model, tmp_path / "cache") for path in (train_file, valid_file)
    )
    report = report_of(train, valid)
    assert report.in_both == 2
    assert report.first_in_both == [
        f"{valid_file}:12 is the same as {train_file}:7",
        f"{valid_file}:13 is the same as {train_file}:3",
    ]


def test_page_shows_the_figures_and_examples_of_the_report(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"<b>{number}</b>?", "completion": "1 2 3 " * number} for number in range(1, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "", "completion": "4"}]))
    data = request(path, context_length=60, bad_rows="skip")
    train = prepare(data, chatml, tiny_model, tmp_path / "cache")
    report = report_of(train, limit=60)
    page = to_html(report, "a-run")
    assert not re.search(r"(src|href|url)\s*=|<script|@import", page), "the page is self-contained"
    assert "&lt;b&gt;1&lt;/b&gt;?" in page
    assert "<mark>1 2 3 &lt;|im_end|&gt;</mark>" in page
    assert f"{train.summary.truncated_rows:,} rows truncated" in page
    assert f"{path}:30: `prompt` is empty" in page
    assert DataReport.model_validate_json(report.model_dump_json()) == report
    assert sum(train.summary.lengths.counts) == 29
    untruncated = prepare(request(path, bad_rows="skip"), chatml, tiny_model, tmp_path / "cache")
    lost = int(np.maximum(untruncated.index.length - 60, 0).sum())
    assert describe_loss(train.summary, 60).startswith(f"{lost:,} tokens")


@pytest.mark.parametrize(("asked", "is_shown"), [(0.125, True), (0.2, False), (0.3, True), (None, False)])
def test_share_of_validation_rows_is_shown_if_it_misses_valid_split(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    asked: float | None,
    is_shown: bool,
):
    paths = write_data(tmp_path, train_rows=40, valid_rows=10)
    train, valid = (prepare(request(path), chatml, tiny_model, tmp_path / "cache") for path in paths)
    figures = dict(key_figures(report_of(train, valid, valid_split=asked)))
    described = figures["validation rows"]
    assert described.startswith(describe_rows(valid.summary))
    assert ("20.0% of all rows" in described) == is_shown
    assert (asked is not None and f"valid_split asks for {asked:.1%}" in described) == is_shown


def test_one_row_is_described_in_the_singular(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    for rows, described in ((1, "1 row in 1 file: "), (2, "2 rows in 1 file: ")):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text('{"prompt": "1 2", "completion": "3"}\n' * rows)
        summary = prepare(request(path), chatml, tiny_model, tmp_path / "cache").summary
        assert describe_rows(summary).startswith(described)
