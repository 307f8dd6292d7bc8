"""Fixtures and hooks that all tests share."""

import multiprocessing.util
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from utils.storage.embedded_bucket import EMBEDDED_BUCKET, STATE_VARIABLE, EmbeddedBucket, embedded_bucket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tests.support.front_door import RunCommand

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it on import; no test contacts the Hub
# Ray lowers the priority of workers by 15: beside another test, they would train at a tenth of their speed.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's spelling

# How long an example takes depends on the machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

KILLS = "kills"
"""Property in which a resume test records how often it killed its run."""


@pytest.fixture(scope="session", autouse=True)
def temporary_directory() -> Iterator[None]:
    """Give libraries in tests and their child processes a temporary directory that is deleted at the end.

    Killed processes leave files there, such as W&B's directories and torch's. Ray's own files stay in /tmp/ray.
    """
    multiprocessing.util.get_temp_dir()  # made where it is, since Python deletes it itself at the end
    # Short, because the paths of sockets are limited to 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(
            "PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()
        )  # pytest keeps the last tests' files there
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        yield


@pytest.hookimpl(trylast=True)  # after -m has deselected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first so that parallel workers finish at about the same time.

    The timeouts of a file's tests rank it: their own, and the default of the slow ones. Other tests take no time in comparison.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        default = float(config.getini("timeout")) if item.get_closest_marker("slow") else 0
        timeout = item.get_closest_marker("timeout")
        seconds[item.path] += timeout.args[0] if timeout else default
    items.sort(key=lambda item: seconds[item.path], reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of kills in the resume tests that passed."""
    passed: list[pytest.TestReport] = terminalreporter.getreports("passed")
    kills = [value for report in passed for name, value in report.user_properties if name == KILLS]
    if kills:
        terminalreporter.write_line(
            f"{sum(kills)} kills in {len(kills)} runs; each run matches an uninterrupted run bit for bit"
        )


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBucket]:
    """Start one real S3 server for the session; `s3://anneal/...` works in this process and its children."""
    state_dir = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATE_VARIABLE, str(state_dir))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in [
            name
            for name in os.environ
            if name.startswith("AWS_") and name.endswith(("_KEY_ID", "_KEY", "_PROFILE"))
        ]:
            patch.delenv(name)
        with embedded_bucket(state_dir) as server:
            yield server


@pytest.fixture
def bucket_uri(bucket: EmbeddedBucket) -> str:
    """Return an empty `s3://` prefix for one test."""
    return f"s3://{EMBEDDED_BUCKET}/test-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny model that all tests share: a test that changes files works on a copy."""
    from tests.support.tiny_model import make_model  # imports torch, which most tests do not need

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chatml(tiny_model: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of the tiny model, which all tests share: a test that changes it works on a copy."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def run_command(tmp_path: Path) -> "RunCommand":
    """Return a function that runs main.py with its arguments."""
    from tests.support.front_door import run_command_quickly

    return lambda *arguments, **variables: run_command_quickly(
        arguments, tmp_path / "command.txt", variables=variables
    )
