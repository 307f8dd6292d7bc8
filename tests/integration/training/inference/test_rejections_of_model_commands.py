"""Tests of the errors of main.py export, chat and evaluate: one message, exit code 2, nothing on standard output."""

from pathlib import Path

import pytest

from runs.layout import CONFIG_FILE
from tests.support.front_door import RunCommand
from tests.support.jobs import error_of
from tests.support.messages import assert_names
from tests.support.own_buckets import unreachable_endpoint
from tests.support.stored_runs import eval_losses, make_result, write_run
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

COMMANDS = (["export"], ["chat", "--prompt", "2 + 2?"], ["evaluate", "--data", "rows.jsonl"])


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["export"], "RUN"),
        (["export", "a", "--dtype", "int8"], "int8"),
        (["export", "a", "--gguf", "--no-merge"], "--no-merge"),
        (["export", "a", "--gguf-type", "q8_0"], "--gguf-type"),
        (["chat", "a", "surplus"], "surplus"),
        (["chat", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["evaluate", "a"], "--data"),
        (["evaluate", "a", "--data", "rows.jsonl", "--column", "question"], "--column"),
        (["evaluate", "a", "--data", "rows.jsonl", "--name", "../a"], "--name"),
        (["evaluate", "a", "--data", "rows.jsonl", "--batch-size", "many"], "--batch-size"),
    ],
    ids=str,
)
def test_invalid_command_line_raises_an_error_with_the_argument(
    run_command: RunCommand, arguments: list[str], fact: str
):
    assert_names(error_of(run_command(*arguments)), fact)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_directory_without_a_run_is_an_error(run_command: RunCommand, command: list[str], tmp_path: Path):
    assert f"{tmp_path}/nowhere" in error_of(run_command(*command, f"{tmp_path}/nowhere"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "where.txt").touch()
    assert_names(error_of(run_command(*command, f"{tmp_path}/else")), f"{tmp_path}/else: ", "no run")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_run_without_checkpoint_or_readable_config_is_an_error(
    run_command: RunCommand, command: list[str], tmp_path: Path
):
    storage = open_store(str(tmp_path / "runs"))
    run = write_run(storage, "begun", [], result=None)
    assert_names(error_of(run_command(*command, run)), run, "no checkpoint")
    result = make_result(storage.uri_of("failed"), [], status="failed", reason="no GPU is left.")
    failed = write_run(storage, "failed", [], result=result)
    assert_names(error_of(run_command(*command, failed)), failed, "failed", "no GPU is left.", "same command")
    damaged = write_run(storage, "damaged", eval_losses(2.0), result=None)
    storage.write(f"damaged/{CONFIG_FILE}", b"model_id: [")
    assert_names(error_of(run_command(*command, damaged)), f"{damaged}/{CONFIG_FILE}: ", "damaged")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_missing_credentials_raise_an_error_with_the_variable(
    run_command: RunCommand, bucket: EmbeddedBucket, tmp_path: Path, command: list[str]
):
    variables = {
        "AWS_ENDPOINT_URL_S3": bucket.endpoint,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "HOME": str(tmp_path),
    }
    message = error_of(run_command(*command, "s3://some-bucket/runs/a", **variables))
    assert_names(message, "no credentials", "AWS_ACCESS_KEY_ID")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_unreachable_endpoint_raises_an_error_with_its_address(run_command: RunCommand, command: list[str]):
    port, variables = unreachable_endpoint()
    message = error_of(run_command(*command, "s3://some-bucket/runs/a", **variables))
    assert_names(message, f"127.0.0.1:{port}", "AWS_ENDPOINT")
