"""The head start of a run: its local cluster starts while the run is planned, and ends with a plan that is rejected."""

import time
from pathlib import Path

import psutil
import pytest

from configs.schema import FinetuneConfig
from tests.support.jobs import error_of, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model_and_data
from training.launch.head_start import head_start
from training.planning.endpoints import ClusterTarget

pytestmark = pytest.mark.timeout(400)


@pytest.mark.slow
def test_rejected_rows_leave_no_process_and_no_run(tmp_path: Path):
    files = make_model_and_data(tmp_path / "files")
    with (files / "train.jsonl").open("a") as rows:
        rows.write('{"messages": []}\n')
    settings = {"num_devices": 1, "train_batch_size_per_device": 4, "lora_config": {"r": 4}}
    seen: dict[int, psutil.Process] = {}
    with started(write_yaml(tmp_path / "run.yaml", tiny_settings(files) | settings)) as job:
        main = psutil.Process(job.process.pid)
        while job.process.poll() is None:
            seen |= {process.pid: process for process in main.children(recursive=True)}
            time.sleep(0.05)
        finished = job.end()
    assert_names(error_of(finished), "train.jsonl:41", "messages", "Fix or remove")
    assert not (files / "runs").exists()
    assert len(seen) > 2, "the cluster was not started while the run was planned"
    _, alive = psutil.wait_procs(seen.values(), timeout=10)
    assert not alive


def test_existing_cluster_receives_no_request_before_the_plan():
    config = FinetuneConfig.model_validate({"model_id": "m", "train_path": "rows.jsonl", "device": "cpu"})
    with head_start(config, ClusterTarget("192.0.2.1:6379")) as workers:
        assert workers is None
