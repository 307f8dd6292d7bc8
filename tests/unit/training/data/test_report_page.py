"""The data report page is complete and escaped."""

import re
from typing import Any

import pytest

from training.data.report import DataReport
from training.data.report_page import to_html
from training.data.summary import DataSummary, Lengths, SourceSummary

ATTACK = "<script>alert(1)</script>"


def summary_of(**changes: Any) -> DataSummary:
    defaults: dict[str, Any] = {
        "rows": 1_234,
        "tokens": 56_789,
        "trained_tokens": 23_456,
        "longest": 412,
        "truncated_rows": 7,
        "lost_tokens": 321,
        "dropped_rows": 2,
        "skipped_rows": {"empty": 3, "no answer": 1},
        "first_skipped": ["rows.jsonl:30: `prompt` is empty"],
        "duplicates": 2,
        "first_duplicates": ["rows.jsonl:9 repeats rows.jsonl:3"],
        "lengths": Lengths(40, 120, 200, 412, [0, 100, 200], [1_000, 200, 34]),
        "sources": [SourceSummary("rows.jsonl", "messages", 1, 1_300, 1_234)],
        "files": ["rows.jsonl"],
        "fingerprint": "0",
        "examples": [[("two and two?\n", False), ("four", True)]],
    }
    return DataSummary(**defaults | changes)


def report_of(**changes: Any) -> DataReport:
    defaults: dict[str, Any] = {
        "train": summary_of(),
        "valid": summary_of(rows=12),
        "limit": 200,
        "in_both": 1,
        "first_in_both": ["valid.jsonl:12 is rows.jsonl:7"],
        "padding_waste": 0.123,
        "steps": 300,
        "steps_per_epoch": 100,
        "sequences_per_step": 8,
    }
    return DataReport(**defaults | changes)


def test_page_shows_every_figure_of_both_splits():
    page = to_html(report_of(), "a-run")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Training rows", "Validation rows"]
    training, _, validation = page.partition("<h2>Validation rows</h2>")
    for part in (
        "<title>Data of a-run</title>",
        "300, 100 per epoch",
        "12.3%",
        "1<ul><li>valid.jsonl:12 is rows.jsonl:7</li></ul>",
        "1,234 rows in 1 file",
    ):
        assert part in training, part
    assert "12 rows in 1 file" in validation
    for split in (training, validation):
        assert [name.partition(";")[0] for name in re.findall(r"<h3>(.*?)</h3>", split)] == [
            "Sources",
            "Tokens per row before truncation",
            "Examples",
        ]
        for part in (
            "56,789 tokens, 23,456 loss tokens (41.3%)",
            "p50 40, p95 120, p99 200, longest 412 tokens",
            "321 tokens (0.6%) at 200 tokens per row: 7 rows truncated, 2 dropped",
            "3 empty, 1 no answer<ul><li>rows.jsonl:30: `prompt` is empty</li></ul>",
            "2<ul><li>rows.jsonl:9 repeats rows.jsonl:3</li></ul>",
            "<td>rows.jsonl</td><td>chats (messages)</td>",
            "<pre>two and two?\n<mark>four</mark></pre>",
        ):
            assert part in split, part


@pytest.mark.parametrize(("limit", "over"), [(None, 0), (150, 1), (100, 2), (500, 0)])
def test_histogram_marks_bars_over_the_limit(limit: int | None, over: int):
    page = to_html(report_of(valid=None, limit=limit), "a-run")
    assert re.findall(r"width:([\d.]+)%", page) == ["100.0", "20.0", "3.4"]
    assert page.count('class="over"') == over


def test_page_without_findings_has_no_lists():
    clean = summary_of(skipped_rows={}, first_skipped=[], duplicates=0, first_duplicates=[])
    page = to_html(report_of(train=clean, valid=None, in_both=0, first_in_both=[]), "a-run")
    assert "<ul>" not in page
    assert "Validation rows" not in page
    assert re.search(r"skipped</th><td>none\s*</td>", page)


def test_user_text_is_escaped():
    hostile = summary_of(
        skipped_rows={ATTACK: 1},
        first_skipped=[ATTACK],
        first_duplicates=[ATTACK],
        sources=[SourceSummary(ATTACK, "messages", 1, 1, 1)],
        examples=[[(ATTACK, False), (ATTACK, True)]],
    )
    page = to_html(report_of(train=hostile, valid=hostile, first_in_both=[ATTACK]), ATTACK)
    assert "<script" not in page
    assert (
        page.count("&lt;script&gt;") == 2 + 1 + 2 * 6
    )  # title and heading, first_in_both, six in each split
