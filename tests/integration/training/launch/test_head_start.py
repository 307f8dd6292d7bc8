"""The head start of a run: its local cluster starts while the run is planned, and ends with a plan that is rejected."""

import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from configs.schema import FinetuneConfig
from tests.support.grids import only_in_test_nodes
from tests.support.jobs import error_of, run_main, started, tiny_settings, write_yaml
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
    _, alive = psutil.wait_procs(seen.values(), timeout=60)
    assert not alive


@pytest.mark.slow
def test_ray_that_cannot_start_is_an_error_with_the_directory_of_its_files(tmp_path: Path):
    files = make_model_and_data(tmp_path / "files")
    config = write_yaml(tmp_path / "run.yaml", tiny_settings(files) | {"num_devices": 1})
    directory = tmp_path / ("too-long" * 10)
    directory.mkdir()
    finished = run_main(config, variables={"RAY_TMPDIR": str(directory)})
    assert_names(error_of(finished), "Ray cannot start", "107 bytes", f"{directory}/ray", "RAY_TMPDIR=")
    assert not (files / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("process", [pytest.param("gcs_server", marks=only_in_test_nodes), "raylet"])
def test_signal_while_ray_starts_leaves_no_session_directory(process: str, tmp_path: Path):
    files = make_model_and_data(tmp_path / "files")
    config = write_yaml(tmp_path / "run.yaml", tiny_settings(files) | {"num_devices": 1})
    # The socket paths of Ray are limited to 107 bytes.
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        started(config, {"RAY_TMPDIR": directory}) as job,
    ):
        main = psutil.Process(job.process.pid)
        job.wait_until(lambda: process in _names(main), process)
        job.process.send_signal(signal.SIGTERM)
        finished = job.end()
        left = [path.name for path in Path(directory).rglob("session_2*")]
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert left == []


def _names(main: psutil.Process) -> set[str]:
    """Return the names of all descendants of a process."""
    names: set[str] = set()
    for child in main.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            names.add(child.name())
    return names


def test_existing_cluster_receives_no_request_before_the_plan():
    config = FinetuneConfig.model_validate({"model_id": "m", "train_path": "rows.jsonl", "device": "cpu"})
    with head_start(config, ClusterTarget("192.0.2.1:6379")) as workers:
        assert workers is None
