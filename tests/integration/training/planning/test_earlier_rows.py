"""A chat template that prints the date prints the day of the run that is resumed, also if its rows are prepared again."""

import shutil
from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

import training.data.chat_template
import training.data.sources
from configs.loading import load_config
from runs.layout import DATA_REPORT_FILE
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.tiny_model import CHAT_TEMPLATE, make_model_and_data
from training.data.report import DataReport
from training.planning.endpoints import ClusterTarget
from training.planning.plan import RunPlan
from training.planning.planner import make_plan
from utils.files import checksum
from utils.storage.bucket import open_store

FIRST, LATER, AFTER = date(2026, 11, 29), date(2026, 12, 3), date(2026, 12, 5)
TEMPLATE = "Today is {{ strftime_now('%Y-%m-%d') }}.\n" + CHAT_TEMPLATE


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return make_model_and_data(tmp_path)


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the date of this process."""

    def set_day(day: date) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> "Clock":
                return cls(day.year, day.month, day.day, tzinfo=tz)

        monkeypatch.setattr(training.data.chat_template, "datetime", Clock)

    return set_day


def plan_of(files: Path, **changes: Any) -> tuple[RunPlan, str | None]:
    """Plan a run and return it with the date in its rows, after writing what a started run writes about its rows."""
    settings = tiny_settings(files) | {"chat_template": TEMPLATE} | changes
    config = write_yaml(files / "dated.yaml", settings)
    plan, report, prepared = make_plan(load_config(config), target=ClusterTarget(None))
    (day,) = {rows.summary.date for rows in prepared} - {None} or {None}
    figures = report.model_dump_json(include=set(DataReport.model_fields)).encode()
    open_store(plan.run_uri).write(DATA_REPORT_FILE, figures)
    return plan, day


def write_texts(path: Path) -> str:
    """Write rows of plain text and return their path."""
    path.write_text("".join(f'{{"text": "The answer is {number}."}}\n' for number in range(40)))
    return str(path)


def delete_prepared(files: Path) -> None:
    for directory in ("runs/prepared", "scratch"):
        shutil.rmtree(files / directory, ignore_errors=True)


@pytest.mark.parametrize("named", [{"run_name": "dated"}, {}], ids=["run_name", "derived name"])
def test_rows_that_are_prepared_again_have_the_day_of_their_run(
    named: dict[str, str], files: Path, on_day: Any
):
    on_day(FIRST)
    first, day = plan_of(files, **named)
    assert day == FIRST.isoformat()
    delete_prepared(files)
    on_day(LATER)
    again, day = plan_of(files, **named)
    assert day == FIRST.isoformat()
    assert (again.run_name, again.data) == (first.run_name, first.data)


@pytest.mark.parametrize("named", [{"run_name": "dated"}, {}], ids=["run_name", "derived name"])
@pytest.mark.parametrize("dated", ["valid_path", "a second validation set"])
def test_chats_that_validate_plain_text_have_the_day_of_their_run(
    dated: str, named: dict[str, str], files: Path, on_day: Any
):
    texts, chats = write_texts(files / "texts.jsonl"), str(files / "valid.jsonl")
    valid = chats if dated == "valid_path" else {"texts": texts, "chats": chats}
    changes = {"task": "causal_lm", "train_path": texts, "valid_path": valid, **named}
    on_day(FIRST)
    first, day = plan_of(files, **changes)
    assert day == FIRST.isoformat()
    on_day(LATER)
    again, day = plan_of(files, **changes)
    assert day == FIRST.isoformat()
    assert (again.run_name, again.data) == (first.run_name, first.data)
    delete_prepared(files)
    assert plan_of(files, **changes)[0].data == first.data


def test_rows_without_chats_are_prepared_once(files: Path, on_day: Any):
    texts = write_texts(files / "texts.jsonl")
    changes = {"task": "causal_lm", "train_path": texts, "valid_path": str(files / "valid.jsonl")}
    on_day(FIRST)
    first, _ = plan_of(files, run_name="first", **changes)
    on_day(LATER)
    later, _ = plan_of(files, run_name="later", **changes)
    assert later.train == first.train, "no text has a date"
    assert later.valid != first.valid, "the chats have"


def test_text_and_chats_in_one_set_have_the_day_of_their_run(files: Path, on_day: Any):
    sources = [{"path": write_texts(files / "texts.jsonl")}, {"path": str(files / "train.jsonl")}]
    changes = {"task": "causal_lm", "train_path": sources}
    on_day(FIRST)
    first, _ = plan_of(files, run_name="first", **changes)
    on_day(LATER)
    later, day = plan_of(files, run_name="later", **changes)
    assert day == LATER.isoformat()
    assert later.train != first.train
    delete_prepared(files)
    again, day = plan_of(files, run_name="first", **changes)
    assert (again.data, day) == (first.data, FIRST.isoformat())


@pytest.mark.parametrize(
    "split", [{}, {"valid_path": None, "valid_split": 0.3}], ids=["valid_path", "valid_split"]
)
def test_a_plan_reads_the_checksum_of_each_file_once(
    split: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
):
    plan_of(files, **split)
    read = Counter[str]()

    def counted(path: Path) -> str:
        read[path.name] += 1
        return checksum(path)

    monkeypatch.setattr(training.data.sources, "checksum", counted)
    plan_of(files, **split)
    assert read == {"train.jsonl": 1} | ({} if split else {"valid.jsonl": 1})


def test_rows_of_another_day_are_not_taken_for_those_of_a_named_run(files: Path, on_day: Any):
    on_day(FIRST)
    first, _ = plan_of(files, run_name="first")
    delete_prepared(files)
    on_day(LATER)
    other, day = plan_of(files, run_name="other")
    assert day == LATER.isoformat()
    again, day = plan_of(files, run_name="first")
    assert (again.data, day) == (first.data, FIRST.isoformat())
    assert again.data != other.data


@pytest.mark.parametrize("named", [{"run_name": "second"}, {}], ids=["run_name", "derived name"])
def test_a_new_run_reuses_no_rows_of_another_day(named: dict[str, str], files: Path, on_day: Any):
    """Prepared rows are on the disk and in the bucket, but the run of that day has another name, or was never started."""
    on_day(FIRST)
    _, day = plan_of(files, run_name="first")
    assert day == FIRST.isoformat()
    on_day(LATER)
    second, day = plan_of(files, **named)
    assert day == LATER.isoformat()
    on_day(AFTER)
    again, day = plan_of(files, **named)
    assert (again.run_name, again.data, day) == (second.run_name, second.data, LATER.isoformat())


def test_changed_rows_of_a_new_run_have_the_day_of_their_preparation(files: Path, on_day: Any):
    on_day(FIRST)
    first, _ = plan_of(files)
    delete_prepared(files)
    rows = files / "train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    on_day(LATER)
    changed, day = plan_of(files)
    assert day == LATER.isoformat()
    assert changed.run_name != first.run_name
