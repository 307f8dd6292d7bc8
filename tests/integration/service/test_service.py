"""The service on Ray Serve, used by OpenAI's own client."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from tests.support.jobs import PROJECT
from tests.support.served import OPENAI, run_client, served
from tests.support.service import write_service

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not OPENAI.is_dir(), reason="OpenAI's client is not installed: make setup-dev"),
]
GRID = pytest.mark.skipif(not os.environ.get("SERVICE_GRID"), reason="`make test-service` runs it")


def check(received: dict[str, Any], model: str) -> None:
    job, failed = received["job"], received["failed"]
    assert job["status"] == "succeeded"
    order = ["validating_files", "queued", "running", "succeeded"]
    assert received["seen"] == [status for status in order if status in received["seen"]]
    assert failed["error"]["code"] == "invalid_file"
    assert failed["error"]["param"] == "training_file"
    assert f"{received['bad']}:1" in failed["error"]["message"]
    assert "s3://" not in failed["error"]["message"]
    assert (received["paused"], received["cancelled"]) == ("paused", "cancelled")
    assert received["listed"] == received["expected"]
    assert received["of_team"] == [job["id"]]
    steps = [event["data"]["step"] for event in received["events"] if event["type"] == "metrics"]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 0
    assert received["events"][-1]["message"] == "Created fine-tuning job"
    newest = received["checkpoints"][0]
    assert newest["step_number"] == steps[0]
    assert newest["metrics"]["valid_loss"] > 0
    lines = received["csv"].splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) == steps[0] + 1
    assert received["unknown"]["code"] == "not_found"
    assert job["fine_tuned_model"].startswith(f"ft:{model}:default:first:")
    assert received["models"] == [model, job["fine_tuned_model"]]
    assert received["retrieved"] == [job["fine_tuned_model"], newest["fine_tuned_model_checkpoint"]]
    assert received["deleted"]
    assert received["models_after"] == [model]
    assert set(received["files_after"]) == {received["file"], job["result_files"][0]}


def test_openai_client_fine_tunes_a_model(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    base = {"output_dir": str(tmp_path / "scratch"), "train_batch_size_per_device": 8, "learning_rate": 1e-3}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(write_problems(TRAIN_KINDS, 16, 1))
    with served(config) as service:
        assert service.key
        check(run_client(service.base_url, service.key, str(rows), "tiny"), "tiny")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 128 + signal.SIGTERM


@GRID
def test_openai_client_fine_tunes_the_quickstart_model(tmp_path: Path, bucket_uri: str):
    quickstart = PROJECT / "cookbooks" / "quickstart" / "smollm2-135m.yaml"
    config = tmp_path / "service.yaml"
    config.write_text(f"storage_path: {bucket_uri}\nmodels:\n  smollm2-135m: {{config: {quickstart}}}\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(write_problems(TRAIN_KINDS, 64, 1))
    with served(config) as service:
        assert service.key
        check(
            run_client(service.base_url, service.key, str(rows), "smollm2-135m", timeout=600), "smollm2-135m"
        )
