"""Fixtures that more than one package's tests use."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from utils.storage.embedded_bucket import STATE_VARIABLE, EmbeddedBucket, embedded_bucket

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test asks the hub

# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

KILLS = "kills"
"""The property under which a test of resume says how often it killed its run."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first, so that parallel workers finish at about the same time.

    A file is as long as its highest timeout; between equal timeouts, a file with slow tests is longer.
    """
    lengths: dict[Path, tuple[float, bool]] = {}
    for item in items:
        timeout = item.get_closest_marker("timeout")
        seconds = float(timeout.args[0] if timeout else config.getini("timeout"))
        length = seconds, item.get_closest_marker("slow") is not None
        lengths[item.path] = max(length, lengths.get(item.path, length))
    items.sort(key=lambda item: lengths[item.path], reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much of the grid of resume was passed."""
    passed: list[pytest.TestReport] = terminalreporter.getreports("passed")
    kills = [value for report in passed for name, value in report.user_properties if name == KILLS]
    if kills:
        terminalreporter.write_line(
            f"{sum(kills)} kills in {len(kills)} runs, each of which ended bit for bit as one that nobody killed"
        )


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBucket]:
    """One real S3 server for the whole session; `s3://anneal/...` works here and in child processes."""
    state_dir = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(STATE_VARIABLE, str(state_dir))
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in [
            name
            for name in os.environ
            if name.startswith("AWS_") and name.endswith(("_KEY_ID", "_KEY", "_PROFILE"))
        ]:
            environment.delenv(name)
        with embedded_bucket(state_dir) as server:
            yield server


@pytest.fixture
def bucket_uri(bucket: EmbeddedBucket) -> str:
    """An `s3://` prefix of its own for one test, with nothing in it."""
    return f"s3://{bucket.bucket}/test-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory for tests to read, never to change: copy it for that."""
    from tests.support.tiny_model import make_model  # imports torch, which most tests do without

    return make_model(tmp_path_factory.mktemp("tiny") / "model")
