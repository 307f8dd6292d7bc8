"""Tests of main.py runs, show, compare, stop and remove: output for runs in every state, requests to the bucket, and errors."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import botocore.session
import psutil
import pytest
from rich.console import Console

from configs.schema import FinetuneConfig, uri_fields, uri_keys
from runs.comparison import Comparison, compare_runs
from runs.display import show_comparison, show_run
from runs.layout import (
    CONFIG_FILE,
    LEASE_EXPIRES_SECONDS,
    MANIFEST_FILE,
    METRICS_FILE,
    RESULT_FILE,
    CheckpointUse,
    DataFingerprints,
    checkpoint_key,
    lease_key,
    use_key,
)
from runs.stop_and_remove import InUseError, check_removable, find_run
from runs.summaries import list_runs, read_run
from tests.support.bucket_proxy import bucket_proxy
from tests.support.front_door import RunCommand
from tests.support.jobs import PROJECT, environment, error_of, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket, unreachable_endpoint
from tests.support.stored_runs import (
    eval_losses,
    make_manifest_with_weights,
    make_result,
    write_lease,
    write_run,
)
from utils.processes import started_after_boot, this_machine
from utils.storage.bucket import Store, join_uri, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

PNG = b"\x89PNG\r\n"
REMOTE_COMMANDS = [
    ["runs", "s3://some-bucket/runs"],
    ["show", "s3://some-bucket/runs/a"],
    ["compare", "s3://some-bucket/runs/a", "s3://some-bucket/runs/b"],
]


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.slow), "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty storage for runs: in a bucket, then in a local directory."""
    return open_store(
        request.getfixturevalue("bucket_uri") if request.param == "s3" else str(tmp_path / "runs")
    )


def write_runs_in_every_state(storage: Store) -> None:
    """Write a run in each state, named after it, and an object that belongs to no run."""
    losses = eval_losses(2.0, 1.5, 1.75)
    for status, hours in (("completed", 3), ("stopped", 50), ("failed", 4)):
        uri = storage.uri_of(f"is-{status}")
        write_run(
            storage, f"is-{status}", losses, result=make_result(uri, losses, status=status, hours_ago=hours)
        )
    write_run(storage, "is-running", losses, result=None)
    write_lease(storage, "is-running")
    previous = make_result(storage.uri_of("is-running-again"), losses[:2], status="stopped", hours_ago=9)
    write_run(storage, "is-running-again", losses, result=previous)
    write_lease(storage, "is-running-again", number=2)
    write_run(storage, "is-interrupted", losses, result=None)
    write_run(storage, "is-damaged", losses, result=None)
    storage.write(f"is-damaged/{RESULT_FILE}", b'{"status": "comp')
    write_run(storage, "has-begun", [], result=None)
    storage.write("prepared/0123/data.arrow", b"no run")


def test_runs_lists_every_run_with_its_status(storage: Store, run_command: RunCommand):
    write_runs_in_every_state(storage)
    finished = run_command("runs", storage.uri, "--json")
    assert finished.exit_code == 0, finished.errors
    (line,) = finished.output.splitlines()
    listed = {run["run_name"]: run for run in json.loads(line)}
    assert {name: run["status"] for name, run in listed.items()} == {
        "is-completed": "completed",
        "is-stopped": "stopped",
        "is-failed": "failed",
        "is-running": "running",
        "is-running-again": "running",
        "is-interrupted": "interrupted",
        "is-damaged": "damaged",
        "has-begun": "interrupted",
    }
    assert {name: (run["best_eval_loss"], run["steps"]) for name, run in listed.items()} == {
        **dict.fromkeys(listed, (1.5, 20)),
        "is-damaged": (None, 0),
        "has-begun": (None, 0),
    }
    assert listed["is-stopped"]["reason"] == "SIGTERM"
    assert f"{listed['is-damaged']['run_uri']}/{RESULT_FILE} " in listed["is-damaged"]["reason"]
    assert listed["is-stopped"]["age_seconds"] == pytest.approx(50 * 3600, abs=600)
    assert list(listed)[-3:] == ["is-failed", "is-stopped", "is-damaged"], (
        "the runs with the latest activity come first"
    )

    finished = run_command("runs", storage.uri)
    assert finished.exit_code == 0, finished.errors
    heading, *names = [line.split()[0] for line in finished.output.splitlines()]
    assert heading == "run"
    assert sorted(names) == sorted(listed)
    assert names[-4:] == list(listed)[-4:], "the ages of these runs differ by hours"
    (stopped,) = [line.split() for line in finished.output.splitlines() if line.startswith("is-stopped")]
    assert stopped == ["is-stopped", "stopped", "1.5000", "20", "2", "days", "SIGTERM"]


def test_run_with_an_expired_lease_is_interrupted(tmp_path: Path):
    storage = open_store(str(tmp_path))
    write_run(storage, "lost", eval_losses(2.0), result=None)
    write_lease(storage, "lost")
    assert [run.status for run in list_runs(storage.uri)] == ["running"]
    long_ago = time.time() - 2 * LEASE_EXPIRES_SECONDS
    os.utime(tmp_path / "lost" / lease_key(1), (long_ago, long_ago))
    (run,) = list_runs(storage.uri)
    assert run.status == "interrupted"
    assert run.age_seconds == pytest.approx(2 * LEASE_EXPIRES_SECONDS, abs=20)


def test_run_of_a_killed_local_driver_is_interrupted_at_once(tmp_path: Path):
    storage = open_store(str(tmp_path))
    write_run(storage, "a", eval_losses(2.0), result=None)
    driver = subprocess.Popen(["sleep", "60"])
    started = started_after_boot(driver.pid)
    write_lease(storage, "a", machine=this_machine(), process=driver.pid, process_started=started)
    long_ago = time.time() - 2 * LEASE_EXPIRES_SECONDS
    os.utime(tmp_path / "a" / lease_key(1), (long_ago, long_ago))
    assert [run.status for run in list_runs(storage.uri)] == ["running"], (
        "a live process on this machine counts more than an expired lease"
    )
    driver.kill()
    os.utime(tmp_path / "a" / lease_key(1))
    _wait_for_zombie(driver.pid)
    assert [run.status for run in list_runs(storage.uri)] == ["interrupted"], (
        "a zombie process counts as dead"
    )
    driver.wait()
    assert [run.status for run in list_runs(storage.uri)] == ["interrupted"]


def _wait_for_zombie(process: int) -> None:
    while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_interrupted_attempt_overrides_the_previous_result(tmp_path: Path):
    storage = open_store(str(tmp_path))
    losses = eval_losses(2.0, 1.5)
    previous = make_result(storage.uri_of("a"), losses[:1], status="stopped", hours_ago=2)
    write_run(storage, "a", losses, result=previous)
    assert read_run(storage.uri_of("a")).status == "stopped"
    long_ago = time.time() - 2 * LEASE_EXPIRES_SECONDS
    for since, status in ((previous.ended, "stopped"), (now_as_text(), "interrupted")):
        write_lease(storage, "a", since=since)
        os.utime(tmp_path / "a" / lease_key(1), (long_ago, long_ago))
        run = read_run(storage.uri_of("a"))
        assert run.status == status
    assert (run.steps, run.reason, run.best_eval_loss) == (10, "", 1.5)


def now_as_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def test_unreadable_lease_marks_the_run_as_damaged(tmp_path: Path):
    storage = open_store(str(tmp_path))
    uri = write_run(storage, "a", eval_losses(2.0), result=None)
    storage.write(f"a/{lease_key(1)}", b"{")
    (run,) = list_runs(storage.uri)
    assert run.status == "damaged"
    assert run.reason.startswith(f"{uri}/{lease_key(1)} ")
    assert "delete" in run.reason


@pytest.mark.slow
def test_listing_sends_one_request_per_completed_run(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch):
    """Checkpoints add no requests; an unfinished run adds a few."""
    completed, unfinished, leased = 1000, 10, 5
    uri = join_uri(set_up_own_bucket(monkeypatch, bucket, "a-thousand-runs"), "runs")
    storage, losses = open_store(uri), eval_losses(2.0, 1.0)
    result = make_result(storage.uri_of("run"), losses).model_dump_json().encode()
    files = {f"run-{number:04d}/{RESULT_FILE}": result for number in range(completed)}
    files |= {f"run-0000/{checkpoint_key(step, 'model.safetensors')}": b"w" for step in range(1200)}
    files |= {f"unfinished-{number}/{METRICS_FILE}": b"" for number in range(unfinished)}
    files |= {f"unfinished-{number}/config.yaml": b"" for number in range(unfinished)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: storage.write(*item), files.items()))
    for number in range(leased):
        write_lease(storage, f"unfinished-{number}")
    with bucket_proxy(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        started = time.monotonic()
        runs = list_runs(uri)
        print(f"\n{len(runs)} runs in {time.monotonic() - started:.2f} s, {len(proxy.requests)} requests")
    assert sum(run.status == "completed" for run in runs) == completed
    assert sum(run.status == "interrupted" for run in runs) == unfinished - leased
    assert sum(run.status == "running" for run in runs) == leased
    fixed_requests = 3 + 2  # checks that the storage exists and is readable; two pages of names
    assert len(proxy.requests) <= fixed_requests + completed + 4 * unfinished + leased
    read = [request.path for request in proxy.downloads("a-thousand-runs")]
    assert not [path for path in read if "checkpoints" in path]


def test_show_prints_result_config_losses_checkpoints_and_damage(storage: Store, run_command: RunCommand):
    losses = eval_losses(2.0, 1.5)
    result = make_result(storage.uri_of("a"), losses, hours_ago=5)
    uri = write_run(storage, "a", losses, result=result)
    shown = run_command("show", uri, "--json").result
    assert shown["result"] == result.model_dump()
    assert shown["config"]["model_id"] == "some/model"
    assert shown["eval_losses"] == [loss.model_dump() for loss in losses]
    (checkpoint,) = shown["checkpoints"]
    assert checkpoint["uri"] == f"{uri}/checkpoints/step-000010"
    assert (checkpoint["size"], checkpoint["eval_loss"]) == (len(b"weights"), 1.5)
    assert shown["damage"] == []
    assert shown["train_loss"] == pytest.approx(1.6)

    storage.delete([f"a/{checkpoint_key(10, 'model.safetensors')}"])
    assert len(run_command("show", uri, "--json").result["damage"]) == 1
    output = run_command("show", uri).output
    for part in (
        uri,
        "completed",
        "1.5000  lowest",
        "some/model",
        "12,345 tokens",
        "5 h ago",
        "1.6000",
    ):
        assert part in output
    assert re.search(r"checkpoints/step-000010/model\.safetensors .*bytes", output)


def test_figures_and_log_of_a_previous_attempt_are_named_as_such(tmp_path: Path):
    storage, losses = open_store(str(tmp_path)), eval_losses(2.0)
    previous = make_result(storage.uri_of("a"), losses, status="stopped").model_copy(
        update={"log_files": ["/logs/a.log"]}
    )
    uri = write_run(storage, "a", losses, result=previous)
    write_lease(storage, "a", number=2)
    console = Console(file=StringIO(), width=1000)
    show_run(console, read_run(uri))
    shown = console.file.getvalue()
    assert re.search(r"^trained .*, at the end of the previous attempt$", shown, re.MULTILINE)
    assert re.search(r"^library output +/logs/a.log.* \(the previous attempt's\)$", shown, re.MULTILINE)


@pytest.mark.parametrize("status", ["completed", "stopped", "failed", "running", "interrupted"])
def test_show_prints_how_to_resume_a_run(tmp_path: Path, status: Any):
    storage, losses = open_store(str(tmp_path)), eval_losses(2.0)
    has_result = status in ("completed", "stopped", "failed")
    result = make_result(storage.uri_of("a"), losses, status=status) if has_result else None
    uri = write_run(storage, "a", losses, result=result)
    if status == "running":
        write_lease(storage, "a")
    console = Console(file=StringIO(), width=1000)
    show_run(console, read_run(uri))
    output = console.file.getvalue()
    assert ("same command" in output) == (status not in ("completed", "running"))
    resume = f"resume_from_checkpoint: {uri}/checkpoints/step-000000"
    assert (resume in output) == (status != "running")


def test_run_names_resolve_in_the_default_storage_path(run_command: RunCommand, bucket_uri: str):
    losses = eval_losses(2.0)
    storage = open_store(join_uri(bucket_uri, "anneal"))
    uri = write_run(storage, "a", losses, result=make_result(storage.uri_of("a"), losses))
    assert (
        run_command("show", "run:a", "--json", ANYSCALE_ARTIFACT_STORAGE=bucket_uri).result["run_uri"] == uri
    )
    listed = run_command("runs", "--json", ANYSCALE_ARTIFACT_STORAGE=bucket_uri).result
    assert [run["run_uri"] for run in listed] == [uri]


@pytest.mark.slow
def test_closed_pipe_ends_the_output_without_an_error(tmp_path: Path):
    write_run(open_store(str(tmp_path / "runs")), "a", eval_losses(2.0), result=None)
    config = write_yaml(tmp_path / "a.yaml", {"model_id": "a", "train_path": "b.jsonl"})
    for arguments in (["runs", str(tmp_path / "runs")], [str(config), "--print-config"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, str(PROJECT / "main.py"), *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


def test_compare_reports_differing_keys_and_best_losses(
    storage: Store, run_command: RunCommand, tmp_path: Path
):
    adapter = {"lora_config": {"r": 8, "lora_alpha": 16}}
    one = write_run(storage, "one", eval_losses(2.0, 1.5), result=None, run_name="one", **adapter)
    other = eval_losses(2.0, 1.25, 1.0)
    two = write_run(
        storage,
        "two",
        other,
        result=make_result(storage.uri_of("two"), other),
        lora_config={"r": 16, "lora_alpha": 16},
        learning_rate=2e-4,
    )
    picture = tmp_path / "both.png"
    finished = run_command("compare", one, two, "--picture", str(picture), "--json")
    assert finished.exit_code == 0, finished.errors
    assert finished.result["differences"] == {"learning_rate": [1e-4, 2e-4], "lora_config.r": [8, 16]}
    assert [run["best_eval_loss"] for run in finished.result["runs"]] == [1.5, 1.0]
    both = picture.read_bytes()
    assert both.startswith(PNG)

    output = run_command("compare", one, two, "--picture", str(picture)).output
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in output.splitlines() if line}
    assert rows["best eval loss"] == ["1.5000", "1.0000"]
    assert rows["lora_config.r"] == ["8", "16"]
    assert rows["curves"][-1] == str(picture)
    unevaluated = write_run(storage, "three", [], result=None)
    run_command("compare", one, unevaluated, "--picture", str(picture))
    assert picture.read_bytes() not in (b"", both), "the picture has a curve per evaluated run"


@pytest.mark.slow
def test_compare_warns_about_runs_evaluated_on_different_rows(run_command: RunCommand, tmp_path: Path):
    storage = open_store(str(tmp_path / "runs"))
    first = {"valid_path": "a.jsonl", "lora_config": {"r": 8}}
    second = {"valid_path": "b.jsonl", "initial_adapter_model_ckpt_path": "run:a"}
    a = write_run(storage, "a", eval_losses(2.0), result=None, **first)
    b = write_run(storage, "b", eval_losses(1.0), result=None, **second)
    unevaluated = write_run(storage, "c", [], result=None)
    picture = str(tmp_path / "picture.png")
    output = run_command("compare", a, b, "--picture", picture).output
    (warning,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert warning.endswith(": valid_path")
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert "initial_adapter_model_ckpt_path - run:a" in rows
    assert [row for row in rows if row.startswith("lora_config.r 8 ") and "parent" in row]
    assert "warning" not in run_command("compare", a, unevaluated, "--picture", picture).output
    finished = run_command("compare", a, b, "--picture", picture, "--json")
    assert finished.result["incomparable_by"] == ["valid_path"]


def test_compare_without_eval_losses_writes_no_picture(run_command: RunCommand, tmp_path: Path):
    storage = open_store(str(tmp_path))
    a, b = (write_run(storage, name, [], result=None) for name in ("a", "b"))
    picture = tmp_path / "none.png"
    finished = run_command("compare", a, b, "--picture", str(picture))
    assert finished.exit_code == 0, finished.errors
    assert "no run has an eval loss" in finished.output
    assert not picture.exists()


def test_compare_names_a_run_whose_settings_are_not_recorded(tmp_path: Path):
    """A run that has just started has only a lease."""
    storage = open_store(str(tmp_path))
    uris = [
        write_run(storage, name, eval_losses(2.0), result=None, learning_rate=rate)
        for name, rate in (("a", 1e-4), ("b", 2e-4))
    ]
    write_lease(storage, "new")
    new = storage.uri_of("new")
    two, three = compare_runs([uris[0], new]), compare_runs([uris[0], new, uris[1]])
    assert two.differences == {}
    assert three.differences == {"learning_rate": [1e-4, None, 2e-4]}
    line = "new: its settings are not recorded yet"
    printed = comparison_lines(two)
    assert line in printed
    assert not [text for text in printed if text.startswith(("setting", "The settings", "model_id"))]
    printed = comparison_lines(three)
    assert line in printed
    assert [text.split() for text in printed if text.startswith(("setting", "learning"))] == [
        ["setting", "a", "b"],
        ["learning_rate", "0.0001", "0.0002"],
    ]


def comparison_lines(comparison: Comparison) -> list[str]:
    console = Console(file=StringIO(), width=200)
    show_comparison(console, comparison, None)
    return console.file.getvalue().splitlines()


def test_comparison_has_no_lines_without_figures(tmp_path: Path):
    storage = open_store(str(tmp_path))
    comparison = compare_runs([write_run(storage, name, [], result=None) for name in ("a", "b")])
    names = {line.split("  ")[0] for line in comparison_lines(comparison)}
    assert "steps" in names
    assert not names & {"best eval loss", "tokens trained on", "tokens/s"}


# --- Errors: one message, exit code 2, nothing on standard output -------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["show"], "RUN"),
        (["compare"], "RUN"),
        (["runs", "a", "surplus"], "surplus"),
        (["show", "a", "--yaml"], "--yaml"),
    ],
    ids=str,
)
def test_invalid_command_line_raises_an_error_with_the_argument(
    run_command: RunCommand, arguments: list[str], fact: str
):
    assert_names(error_of(run_command(*arguments)), fact)


def test_comparing_a_run_with_itself_raises_an_error(run_command: RunCommand, tmp_path: Path):
    run = write_run(open_store(str(tmp_path)), "a", eval_losses(2.0), result=None)
    picture = tmp_path / "a.png"
    for runs in ([run], [run, f"{run}/"]):
        message = error_of(run_command("compare", *runs, "--picture", str(picture)))
        assert_names(message, "two different runs", run)
    assert not picture.exists()


def test_empty_default_storage_names_the_command_for_another(
    run_command: RunCommand, storage: Store, monkeypatch: pytest.MonkeyPatch
):
    """A converted YAML stores its runs in a directory."""
    monkeypatch.setenv("ANYSCALE_ARTIFACT_STORAGE", storage.uri_of("nowhere"))
    assert_names(error_of(run_command("runs")), "there are no runs yet", "main.py runs STORAGE_PATH")


@pytest.mark.parametrize("command", ["runs", "show"])
def test_uri_without_runs_is_an_error(run_command: RunCommand, storage: Store, command: str):
    nowhere = storage.uri_of("nowhere")
    message = error_of(run_command(command, nowhere))
    assert nowhere in message
    if command == "runs":
        assert_names(message, "there are no runs yet", f"storage_path: {nowhere}")
    storage.write("else/where.txt", b"no run")
    message = error_of(run_command(command, storage.uri))
    assert message.startswith(f"{storage.uri}: ")
    assert "no run" in message


def test_listing_a_single_run_raises_an_error_with_the_show_command(run_command: RunCommand, storage: Store):
    uri = write_run(storage, "a", eval_losses(2.0), result=None)
    assert f"main.py show {uri}" in error_of(run_command("runs", uri))
    message = error_of(run_command("runs", "run:a"))
    assert message.startswith("run:a ")
    assert "main.py show run:a" in message


def test_unknown_run_or_checkpoint_raises_an_error_with_a_listing_command(
    run_command: RunCommand, storage: Store
):
    write_run(storage, "first", eval_losses(2.0), result=None)
    assert_names(error_of(run_command("show", "first")), "first: ", "run:first")
    assert_names(error_of(run_command("show", "run:")), "run:NAME")
    nope = storage.uri_of("nope")
    for command in (["show"], ["compare", storage.uri_of("first")], ["export"]):
        message = error_of(run_command(*command, nope))
        assert message.startswith(f"{nope}: ")
        assert_names(message, "run", f"main.py runs {storage.uri}`")
    checkpoint = storage.uri_of("first/checkpoints/step-000077")
    message = error_of(run_command("export", checkpoint))
    assert message.startswith(f"{checkpoint}: ")
    assert_names(message, "checkpoint", f"main.py show {storage.uri_of('first')}`")


@pytest.mark.parametrize(("word", "command"), [("shwo", "show"), ("run", "runs"), ("exprot", "export")])
def test_misspelt_command_raises_an_error_with_the_nearest_command(
    run_command: RunCommand, word: str, command: str
):
    assert_names(error_of(run_command(word, "run:a", "--json")), word, f"main.py {command}?")
    assert f"main.py {command}" not in error_of(run_command(f"{word}.yaml"))


@pytest.mark.parametrize("content", [b":::{", b"a: [", b""])
def test_damaged_config_is_named_beside_the_status_that_runs_lists(
    run_command: RunCommand, tmp_path: Path, content: bytes
):
    storage, losses = open_store(str(tmp_path / "runs")), eval_losses(2.0)
    uri = write_run(storage, "a", losses, result=make_result(storage.uri_of("a"), losses))
    other = write_run(storage, "other", losses, result=None)
    storage.write(f"a/{CONFIG_FILE}", content)
    runs: Any = run_command("runs", storage.uri, "--json").result
    listed = {run["run_name"]: run for run in runs}
    shown = run_command("show", uri, "--json").result
    assert shown["status"] == listed["a"]["status"] == "completed"
    assert f"{uri}/{CONFIG_FILE} is" in "".join(shown["damage"])
    for command in (["show", uri], ["compare", uri, other, "--picture", str(tmp_path / "a.png")]):
        finished = run_command(*command)
        assert finished.exit_code == 0, finished.errors
        assert_names(finished.output, "damaged", f"{uri}/{CONFIG_FILE} is", "completed")


@pytest.mark.parametrize("arguments", REMOTE_COMMANDS, ids=lambda arguments: arguments[0])
def test_missing_credentials_raise_an_error_with_the_variable(
    run_command: RunCommand, bucket: EmbeddedBucket, tmp_path: Path, arguments: list[str]
):
    variables = {
        "AWS_ENDPOINT_URL_S3": bucket.endpoint,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "HOME": str(tmp_path),
    }
    message = error_of(run_command(*arguments, **variables))
    assert_names(message, "no credentials", "AWS_ACCESS_KEY_ID")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", REMOTE_COMMANDS, ids=lambda arguments: arguments[0])
def test_unreachable_endpoint_raises_an_error_with_its_address(run_command: RunCommand, arguments: list[str]):
    port, variables = unreachable_endpoint()
    message = error_of(run_command(*arguments, **variables))
    assert_names(message, f"127.0.0.1:{port}", "AWS_ENDPOINT")


def test_unwritable_picture_raises_an_error_with_its_path(run_command: RunCommand, tmp_path: Path):
    run = write_run(open_store(str(tmp_path)), "a", eval_losses(2.0), result=None)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    for name, fact in {
        "file/a.png": f"{tmp_path}/file is a file",
        "new/a.png": f": {tmp_path}/new ",
        "a.txt": ".png",
        "full": f"{tmp_path}/full/comparison.png",
    }.items():
        message = error_of(run_command("compare", run, "--picture", f"{tmp_path}/{name}"))
        assert_names(message, f"{tmp_path}/{name}: ", fact)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("status", ["completed", None], ids=["completed", "interrupted"])
def test_truncated_line_of_metrics_is_named_and_the_lines_before_it_are_read(
    run_command: RunCommand, tmp_path: Path, status: Any
):
    storage, losses = open_store(str(tmp_path / "runs")), eval_losses(2.0, 1.5)
    result = make_result(storage.uri_of("a"), losses) if status else None
    uri = write_run(storage, "a", losses, result=result)
    whole = storage.read(f"a/{METRICS_FILE}")
    storage.write(f"a/{METRICS_FILE}", whole[:-9])
    shown = run_command("show", uri, "--json").result
    (listed,) = run_command("runs", str(tmp_path / "runs"), "--json").result
    assert shown["status"] == listed["status"] == (status or "interrupted")
    assert shown["steps"] == listed["steps"]
    (damage,) = shown["damage"]
    assert_names(damage, f"{uri}/{METRICS_FILE}", f"line {len(whole.splitlines())}", "truncated")
    other = write_run(storage, "other", losses, result=None)
    compared = run_command("compare", uri, other, "--picture", str(tmp_path / "a.png"))
    assert compared.exit_code == 0, compared.errors
    assert METRICS_FILE in compared.output
    assert storage.read(f"a/{METRICS_FILE}") == whole[:-9]


@pytest.mark.parametrize(("rows", "incomparable"), [("1", []), ("2", ["valid_path"]), (None, ["valid_path"])])
def test_equal_validation_rows_are_comparable_under_two_paths(
    tmp_path: Path, rows: str | None, incomparable: list[str]
):
    storage, losses = open_store(str(tmp_path)), eval_losses(2.0)
    uris = [
        write_run(storage, name, losses, result=None, valid_path=f"{name}.jsonl") for name in ("one", "two")
    ]
    for name, fingerprint in (("one", "1"), ("two", rows)):
        manifest = make_manifest_with_weights(losses[-1])
        manifest = manifest.model_copy(update={"data": DataFingerprints(train="0", valid=fingerprint)})
        key = f"{name}/{checkpoint_key(losses[-1].step, MANIFEST_FILE)}"
        storage.write(key, manifest.model_dump_json().encode())
    assert compare_runs(uris).incomparable_by == incomparable


def test_remove_deletes_only_the_confirmed_run(run_command: RunCommand, storage: Store):
    losses = eval_losses(2.0, 1.5)
    uri = write_run(storage, "a", losses, result=make_result(storage.uri_of("a"), losses))
    other = write_run(storage, "ab", losses, result=None)
    assert_names(error_of(run_command("remove", uri)), uri, "--yes")
    assert read_run(uri).checkpoints
    removed = run_command("remove", uri, "--yes")
    assert removed.exit_code == 0, removed.errors
    assert storage.list("a/") == []
    assert read_run(other).checkpoints
    assert_names(error_of(run_command("remove", uri, "--yes")), uri, "no such run")


def test_run_that_other_runs_need_is_not_removed(tmp_path: Path):
    storage, losses = open_store(str(tmp_path)), eval_losses(2.0)
    for name in ("running", "marked", "parent", "named", "free", "nam"):
        write_run(storage, name, losses, result=None)
    write_lease(storage, "running")
    marked = f"{storage.uri_of('marked')}/{checkpoint_key(0)}"
    use = CheckpointUse(run_uri="s3://elsewhere/child")
    storage.write(f"marked/{use_key(marked, use.run_uri)}", use.model_dump_json().encode())
    parent = f"{storage.uri_of('parent')}/checkpoints/step-000000"
    child = make_result(storage.uri_of("child"), losses, parent=parent)
    write_run(storage, "child", losses, result=child)
    write_run(storage, "later", losses, result=None, initial_adapter_model_ckpt_path="run:named")
    for name, user in (
        ("running", "main.py stop"),
        ("marked", use.run_uri),
        ("parent", "/child"),
        ("named", "/later"),
    ):
        with pytest.raises(InUseError, match=user):
            check_removable(find_run(storage.uri_of(name)))
    assert check_removable(find_run(storage.uri_of("free"))) == []
    assert check_removable(find_run(storage.uri_of("nam"))) == []


@pytest.mark.slow
def test_check_before_a_removal_reads_the_other_runs_in_parallel_with_one_client(
    bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    others = 40
    uri = join_uri(set_up_own_bucket(monkeypatch, bucket, "neighbours"), "runs")
    storage, losses = open_store(uri), eval_losses(2.0)
    for number in range(others):
        write_run(storage, f"run-{number:02d}", losses, result=None)
    write_run(storage, "free", losses, result=None)
    free = find_run(storage.uri_of("free"))
    clients: list[str] = []
    create = botocore.session.Session.create_client
    monkeypatch.setattr(
        botocore.session.Session,
        "create_client",
        lambda session, name, **settings: (clients.append(name), create(session, name, **settings))[1],
    )
    latency = 0.3  # long compared with the work of a busy machine
    with bucket_proxy(bucket.endpoint, latency_seconds=latency) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        started = time.monotonic()
        assert check_removable(free) == []
        seconds = time.monotonic() - started
    assert len(proxy.requests) <= 2 * others + 2
    assert len(clients) <= 2, "one for the run, one for the storage path"
    assert seconds < others * 2 * latency / 2


@pytest.mark.parametrize("key", uri_keys("model", "data"))
@pytest.mark.parametrize("place", ["{uri}/exports/merged", "file://{uri}/exports/merged", "{uri}"])
def test_run_whose_files_another_run_reads_is_not_removed(tmp_path: Path, key: str, place: str):
    storage, losses = open_store(str(tmp_path)), eval_losses(2.0)
    uri = write_run(storage, "a", losses, result=None)
    value: Any = place.format(uri=uri)
    settings = {key: [{"path": value, "weight": 2}] if key == "train_path" else value}
    write_run(storage, "child", losses, result=None, **settings)
    with pytest.raises(InUseError, match="/child"):
        check_removable(find_run(uri))


def test_keys_of_every_model_in_a_yaml_are_uri_keys():
    named = dict.fromkeys(uri_keys("model", "data"), "s3://a/b")
    alone = ("model_id", "train_path")  # the others exclude each other
    for key in named:
        settings = {name: uri for name, uri in named.items() if name == key or name in alone}
        found = uri_fields(FinetuneConfig.model_validate(settings))
        assert key in {field.key.partition(".")[0] for field in found}
    assert "storage_path" not in uri_keys("model", "data")


@pytest.mark.parametrize("file", [CONFIG_FILE, RESULT_FILE, "used-by"])
def test_record_that_cannot_be_read_is_named_and_blocks_no_confirmed_removal(
    run_command: RunCommand, tmp_path: Path, file: str
):
    storage, losses = open_store(str(tmp_path / "runs")), eval_losses(2.0)
    uri = write_run(storage, "a", losses, result=None)
    other = write_run(storage, "other", losses, result=None)
    mark = use_key(f"{uri}/{checkpoint_key(0)}", other)
    damaged = f"a/{mark}" if file == "used-by" else f"other/{file}"
    storage.write(damaged, b"{")
    rejected = run_command("remove", uri)
    assert rejected.exit_code == 2
    assert_names(rejected.errors, "cannot check whether a run needs a", storage.uri_of(damaged), "--yes")
    removed = run_command("remove", uri, "--yes")
    assert removed.exit_code == 0, removed.errors
    assert storage.uri_of(damaged) in removed.errors
    assert not (tmp_path / "runs" / "a").exists()
    assert (tmp_path / "runs" / "other").exists()


def test_run_with_empty_directories_of_a_killed_copy_is_removed(run_command: RunCommand, tmp_path: Path):
    uri = write_run(open_store(str(tmp_path)), "a", eval_losses(2.0), result=None)
    (Path(uri) / "exports" / "step-000010-merged" / "weights").mkdir(parents=True)
    removed = run_command("remove", uri, "--yes")
    assert removed.exit_code == 0, removed.errors
    assert not Path(uri).exists()


@pytest.mark.slow
def test_end_of_input_at_the_question_removes_nothing(tmp_path: Path):
    uri = write_run(open_store(str(tmp_path)), "a", eval_losses(2.0), result=None)
    terminal, stdin = os.openpty()
    command = [sys.executable, "main.py", "remove", uri]
    removing = subprocess.Popen(
        command, cwd=PROJECT, env=environment(), stdin=stdin, stderr=subprocess.PIPE, text=True
    )
    os.write(terminal, b"\x04")
    _, errors = removing.communicate(timeout=120)
    os.close(terminal)
    os.close(stdin)
    assert removing.returncode == 2
    assert errors.splitlines()[1:] == [f"error: {uri}: not removed"]
    assert Path(uri).exists()


def test_directory_that_is_no_run_is_neither_removed_nor_stopped(run_command: RunCommand, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    for command in (["remove", "--yes"], ["stop"]):
        assert "no run" in error_of(run_command(*command, str(tmp_path / "data")))
    assert (tmp_path / "data" / "rows.jsonl").exists()


def test_run_without_a_driver_cannot_be_stopped(run_command: RunCommand, tmp_path: Path):
    uri = write_run(open_store(str(tmp_path)), "a", eval_losses(2.0), result=None)
    assert_names(error_of(run_command("stop", uri)), uri, "interrupted", "nothing to stop")
