"""What main.py export, chat and evaluate refuse: one message, exit code 2, nothing on standard output."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from runs.layout import CONFIG_FILE
from tests.support.front_door import run_command_quickly
from tests.support.jobs import Finished
from tests.support.stored_runs import eval_losses, result_of, write_run
from utils.bucket import open_store
from utils.embedded_bucket import EmbeddedBucket

COMMANDS = (["export"], ["chat", "--prompt", "2 + 2?"], ["evaluate", "--data", "rows.jsonl"])
Use = Callable[..., Finished]


@pytest.fixture
def use(tmp_path: Path) -> Use:
    """Run main.py with these arguments."""
    return lambda *arguments, **variables: run_command_quickly(
        arguments, tmp_path / "said.txt", variables=variables
    )


def refusal(finished: Finished) -> str:
    assert finished.exit_code == 2, finished
    assert finished.output == ""
    assert "Traceback" not in finished.errors
    assert finished.errors.count("error: ") == 1, finished.errors
    return finished.errors.partition("error: ")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", "a", "--dtype", "int8"],
        ["export", "a", "--gguf", "--no-merge"],
        ["chat", "a", "b"],
        ["chat", "a", "--max-new-tokens", "0"],
        ["evaluate", "a"],
        ["evaluate", "a", "--data", "rows.jsonl", "--column", "question"],
        ["evaluate", "a", "--data", "rows.jsonl", "--name", "../a"],
        ["evaluate", "a", "--data", "rows.jsonl", "--batch-size", "many"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(use: Use, arguments: list[str]):
    assert refusal(use(*arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_run(use: Use, command: list[str], tmp_path: Path):
    assert f"{tmp_path}/nowhere" in refusal(use(*command, f"{tmp_path}/nowhere"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "where.txt").touch()
    assert f"{tmp_path}/else: there is no run" in refusal(use(*command, f"{tmp_path}/else"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_checkpoint_and_no_configuration_of_ours(use: Use, command: list[str], tmp_path: Path):
    storage = open_store(str(tmp_path / "runs"))
    run = write_run(storage, "begun", [], result=None)
    assert f"the run {run} has committed no checkpoint yet" in refusal(use(*command, run))
    result = result_of(storage.uri_of("failed"), [], status="failed", reason="no GPU is left.")
    failed = write_run(storage, "failed", [], result=result)
    assert (
        f"the run {failed} failed before its first checkpoint: no GPU is left. Rerun its command"
        in refusal(use(*command, failed))
    )
    damaged = write_run(storage, "damaged", eval_losses(2.0), result=None)
    storage.write(f"damaged/{CONFIG_FILE}", b"model_id: [")
    assert f"{damaged}/{CONFIG_FILE}: is damaged" in refusal(use(*command, damaged))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_credentials(use: Use, bucket: EmbeddedBucket, tmp_path: Path, command: list[str]):
    variables = {
        "AWS_ENDPOINT_URL_S3": bucket.endpoint,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "HOME": str(tmp_path),
    }
    assert "no credentials found" in refusal(use(*command, "s3://some-bucket/runs/a", **variables))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_network(use: Use, command: list[str]):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    variables = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    assert "does not answer" in refusal(use(*command, "s3://some-bucket/runs/a", **variables))
