"""Config and metrics read from the stored files of a run."""

import json
from typing import get_args

import pytest

from runs.layout import CONFIG_FILE, EvalSample, MetricsLine, Phase, RunResult, run_of, samples_key
from runs.reading import eval_losses_of, overall_speed, read_config, read_metrics, survey_samples
from tests.support.stored_runs import make_result
from utils.storage.bucket import Store, open_store


@pytest.mark.parametrize(
    ("checkpoint", "run_uri"),
    [
        ("s3://bucket/runs/a/checkpoints/step-000120/", "s3://bucket/runs/a"),
        ("/runs/a/checkpoints/step-1000000", "/runs/a"),
        ("s3://bucket/checkpoints/llama-3-8b", ""),
        ("s3://bucket/runs/a", ""),
    ],
)
def test_run_uri_is_derived_from_the_checkpoint_uri(checkpoint: str, run_uri: str):
    assert run_of(checkpoint) == run_uri


def test_nan_and_infinite_evaluation_losses_are_excluded(tmp_path):
    store = open_store(str(tmp_path))
    lines = [
        {"step": 1, "epoch": 0.1, "eval_loss": 2.0, "eval_f1": float("nan"), "eval_accuracy": 0.5},
        {"step": 2, "epoch": 0.2, "eval_loss": float("nan")},
        {"step": 3, "epoch": 0.3, "eval_loss": float("inf")},
    ]
    store.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    losses = eval_losses_of(read_metrics(store))
    assert [(loss.step, loss.figures) for loss in losses] == [(1, {"accuracy": 0.5})]
    result = make_result("s3://bucket/runs/a", losses)
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def step_line(step: int, seconds: float) -> MetricsLine:
    """Return the metrics of a step that took this time in each phase."""
    phases = {f"seconds/{phase}": seconds for phase in get_args(Phase)}
    return MetricsLine(step=step, epoch=0.0, loss=1.0, **phases)


def test_overall_speed_counts_the_steps_of_all_attempts_until_the_result():
    result = make_result("/runs/a", [], train_steps=3, tokens=600, tokens_per_second=4.0)
    evaluation = MetricsLine(step=2, epoch=0.0, eval_loss=1.0)
    lines = [step_line(1, 1.0), step_line(2, 2.0), evaluation, step_line(3, 3.0), step_line(4, 100.0)]
    trained_phases = 5  # excluding evaluation, saving and upload_stall
    assert overall_speed(result, lines) == pytest.approx(600 / (trained_phases * 6.0), abs=1e-3)


def test_overall_speed_is_unknown_without_the_seconds_of_every_step():
    result = make_result("/runs/a", [], train_steps=2, tokens=600)
    without_seconds = MetricsLine(step=2, epoch=0.0, loss=1.0)
    assert overall_speed(result, [step_line(1, 1.0)]) is None
    assert overall_speed(result, [step_line(1, 1.0), without_seconds]) is None
    assert overall_speed(make_result("/runs/a", [], train_steps=0), []) is None


def test_missing_damaged_and_incompatible_configs_are_distinguished(tmp_path):
    store = open_store(str(tmp_path))
    assert read_config(store) is None
    for content in (b"a: [", b":::{", b"\xff", b"", b"run_name: cut\n"):
        store.write(CONFIG_FILE, content)
        damaged = read_config(store)
        assert damaged
        assert (damaged.keys, damaged.config) == ({}, None)
        assert damaged.damage
        assert CONFIG_FILE in damaged.damage
    store.write(CONFIG_FILE, b"model_id: a/b\ntrain_path: t.jsonl\nof_another_version: 1\n")
    other = read_config(store)
    assert other
    assert (other.config, other.damage, other.keys["of_another_version"]) == (None, None, 1)
    store.write(CONFIG_FILE, b"model_id: a/b\ntrain_path: t.jsonl\n")
    valid = read_config(store)
    assert valid
    assert valid.config
    assert valid.config.model_id == "a/b"


def steps_of_samples(store: Store, most: int, until: int) -> list[int]:
    samples, damage = survey_samples(store, most, until)
    assert damage is None
    return [sample.step for sample in samples]


def test_samples_of_a_few_evaluations_are_read(tmp_path):
    """The first and the last one are always among them; evaluations after the last committed step are not."""
    store = open_store(str(tmp_path))
    assert steps_of_samples(store, 5, 100) == []
    for step in range(0, 110, 10):
        sample = EvalSample(
            step=step, row="f:1", prompt="p", completion="c", reference="r", tokens=1, ended=True
        )
        store.write(samples_key(step), sample.model_dump_json().encode() + b"\n")
    assert steps_of_samples(store, 1, 90) == [90]
    assert steps_of_samples(store, 5, 1000) == [0, 20, 50, 80, 100]
    assert steps_of_samples(store, 5, 10) == [0, 10]
    store.write(samples_key(90), b"{")
    samples, damage = survey_samples(store, 1, 90)
    assert samples == []
    assert damage is not None
    assert samples_key(90) in damage
