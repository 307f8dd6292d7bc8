"""Jobs run on their own local Ray cluster and on an existing one."""

import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig

from tests.support.front_door import run_main_quickly
from tests.support.grids import only_in_test_nodes
from tests.support.jobs import PROJECT, environment, run_main, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.ray_cluster import RayCluster, held_cpu, needs_ray_default, ray_cluster
from tests.support.tiny_model import make_model_and_data
from training.launch.trainer import LeanTorchTrainer
from training.loop.ray_internals import DatasetsCallback, LeanTrainer, PlacementGroupCleanerCallback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("clusters"))


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[RayCluster]:
    """An existing cluster with 2 CPUs, for tests that leave it as it is."""
    with ray_cluster(cpus=2) as cluster:
        yield cluster


def config(files: Path, path: Path, **more: object) -> Path:
    settings = {"num_devices": 2, "train_batch_size_per_device": 4, "lora_config": {"r": 4}, **more}
    return write_yaml(path, tiny_settings(files) | settings)


def test_trainer_omits_ray_callbacks_that_would_delay_the_start():
    """The test fails if a newer Ray creates these callbacks in another way."""
    omitted = {DatasetsCallback, PlacementGroupCleanerCallback}
    trainer = LeanTorchTrainer(
        lambda: None,
        is_local=False,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="any", failure_config=FailureConfig()),
    )
    ray_callbacks = [type(callback) for callback in super(LeanTrainer, trainer)._create_default_callbacks()]
    assert omitted <= set(ray_callbacks)
    callbacks = [type(callback) for callback in trainer._create_default_callbacks()]
    assert callbacks == [callback for callback in ray_callbacks if callback not in omitted]


PRINT_GPUS_OF_WORKER = """
import os
import ray
from training.planning.endpoints import target_cluster
from training.launch.cluster import Workers, cluster
with cluster(Workers(count=1, least=1, device="cpu", each={"CPU": 1.0}, storage="/tmp/runs"), target_cluster(), progress=print):
    seen = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    print("seen:", repr(ray.get(seen.remote())))
"""


def output_of_worker(variables: dict[str, str]) -> str:
    """Return the output of a CPU job that prints its worker's GPUs, on a node whose environment lists two."""
    command = [sys.executable, "-c", PRINT_GPUS_OF_WORKER]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=environment() | {"CUDA_VISIBLE_DEVICES": "0,1"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_workers_see_no_gpus():
    """Ray hides no GPUs from a worker that requested none; Unsloth, bitsandbytes and DeepSpeed would use them."""
    assert "seen: ''" in output_of_worker({})
    with ray_cluster(cpus=1, variables={"CUDA_VISIBLE_DEVICES": "0,1"}) as cluster:
        assert "seen: ''" in output_of_worker(cluster.variables)


STOP_AFTER_DISCONNECTING = """
import os, signal
from training.launch.cluster import Workers, cluster
from training.planning.endpoints import target_cluster
from utils.processes import Stopped, raise_signals
raise_signals()
try:
    with cluster(Workers(count=1, least=1, device="cpu", each={"CPU": 1.0}, storage="/tmp/runs"), target_cluster(), progress=print):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
except Stopped as stopped:
    print(stopped.name)
"""


def test_signals_are_handled_after_disconnecting():
    """ray.shutdown() restores the kernel's default action for SIGTERM, but signal.getsignal still returns the handler."""
    done = subprocess.run(
        [sys.executable, "-c", STOP_AFTER_DISCONNECTING],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr


LIST_SESSIONS_AFTER_EACH_CLUSTER = """
import os, sys
from pathlib import Path
from training.launch.cluster import Workers, cluster
from training.planning.endpoints import target_cluster
workers = Workers(count=1, least=1, device="cpu", each={"CPU": 1.0}, storage="/tmp/runs")
for end in ("well", "kept", "error"):
    before = set(Path(os.environ["RAY_TMPDIR"]).rglob("session_*"))
    try:
        with cluster(workers, target_cluster(), progress=print) as connection:
            connection.keeps_logs = end == "kept"
            if end == "error":
                raise RuntimeError
    except RuntimeError:
        pass
    left = set(Path(os.environ["RAY_TMPDIR"]).rglob("session_2*")) - before
    print(end, len(left), *(path.readlink() in left for path in Path(os.environ["RAY_TMPDIR"]).rglob("session_latest")))
"""


def test_session_directory_of_a_local_cluster_is_removed_unless_its_logs_may_be_needed():
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as directory:  # the socket paths of Ray are limited to 107 bytes
        done = subprocess.run(
            [sys.executable, "-c", LIST_SESSIONS_AFTER_EACH_CLUSTER],
            cwd=PROJECT,
            env=environment() | {"RAY_TMPDIR": directory},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.stdout.splitlines() == ["well 0", "kept 1 True", "error 1 True"], done.stderr


def test_excess_worker_memory_raises_an_error_and_excess_cpus_do_not(files: Path, tmp_path: Path):
    """Ray would wait forever for the memory. The CPU count of a local cluster is only an argument of ray.init."""
    yaml = config(files, tmp_path / "large.yaml", max_steps=1, num_epochs=None)
    rejected = run_main(yaml, "worker_resources.memory=900TiB", "--json")
    assert rejected.exit_code == 2, rejected.errors
    assert_names(rejected.errors, "2 workers", "memory")
    accepted = run_main(yaml, "worker_resources.CPU=99", "--json")
    assert accepted.exit_code == 0, accepted.errors


def test_ray_address_runs_a_job_on_an_existing_cluster(
    files: Path, tmp_path: Path, shared_cluster: RayCluster
):
    """The code is uploaded to the cluster, which keeps running after the job."""
    yaml = config(files, tmp_path / "joined.yaml", num_epochs=1)
    cluster = shared_cluster
    unauthorized = run_main(yaml, "--json", variables={"RAY_ADDRESS": cluster.address})
    dry_run = run_main_quickly(yaml, "--dry-run", "--json", variables=cluster.variables)
    finished = run_main(yaml, "--json", variables=cluster.variables)
    too_many = run_main(yaml, "num_devices=3", "--json", variables=cluster.variables)
    too_many_dry_run = run_main_quickly(yaml, "num_devices=3", "--dry-run", variables=cluster.variables)
    assert unauthorized.exit_code == 2
    (rejected,) = unauthorized.errors.splitlines()  # nothing was read before
    assert "RAY_AUTH_MODE=token" in rejected
    assert dry_run.exit_code == 0, dry_run.errors
    assert dry_run.result["cluster"].startswith(f"{cluster.address} ")
    assert dry_run.result["config"]["num_devices"] == 2
    assert "weight_decay" in dry_run.result["defaults"]
    assert "num_devices" not in dry_run.result["defaults"]
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 5
    for rejected in (too_many, too_many_dry_run):
        assert rejected.exit_code == 2
        assert_names(rejected.errors, "3 workers", "CPU 3 (has 2)")


@only_in_test_nodes
def test_killed_driver_leaves_its_resources_to_the_next_job(
    files: Path, tmp_path: Path, shared_cluster: RayCluster
):
    """Each of the two jobs needs all CPUs of the cluster."""
    yaml = config(files, tmp_path / "killed.yaml", run_name="killed", max_steps=4000, num_epochs=None)
    with started(yaml, shared_cluster.variables) as job:
        job.wait_for_line("step 3/")
        job.process.kill()
        job.process.wait()
        finished = run_main(
            yaml, "run_name=next", "max_steps=1", "--json", variables=shared_cluster.variables
        )
    assert finished.exit_code == 0, finished.errors


@pytest.mark.parametrize(
    "process",
    ["head", *(pytest.param(name, marks=only_in_test_nodes) for name in ("raylet", "gcs_server"))],
)
def test_lost_head_is_reported_with_its_log(process: str, files: Path, tmp_path: Path):
    yaml = config(files, tmp_path / "lost.yaml", run_name=f"lost-{process}", max_steps=4000, num_epochs=None)
    with ray_cluster(cpus=2) as cluster, started(yaml, cluster.variables) as job:
        job.wait_for_line("step 3/")
        cluster.kill_head(process)
        killed = time.monotonic()
        finished = job.end()
        assert time.monotonic() - killed < 45, (
            "20 s on an idle machine; Ray itself takes a minute for the GCS"
        )
    assert finished.exit_code == 1, finished.errors
    assert_names(finished.result["reason"], "cluster was lost", ".out", "same command")
    assert finished.errors.count("error: ") == 1
    assert "Traceback" not in finished.errors


@only_in_test_nodes
def test_busy_cluster_is_reported_while_a_job_waits(files: Path, tmp_path: Path, shared_cluster: RayCluster):
    first = config(files, tmp_path / "first.yaml", run_name="first", max_steps=9000, num_epochs=None)
    second = config(files, tmp_path / "second.yaml", run_name="second", num_devices=1, max_steps=1)
    with started(first, shared_cluster.variables) as job:
        job.wait_for_line("step 1/")
        dry_run = run_main_quickly(second, "--dry-run", "--json", variables=shared_cluster.variables)
        with started(second, shared_cluster.variables) as waiting:
            waiting.wait_for_line("waiting until other work")
            job.process.send_signal(signal.SIGTERM)
            finished = waiting.end()
    assert_names(dry_run.result["cluster"], "not free", "CPU 1 (has 2, free 0)")
    assert finished.exit_code == 0, finished.errors
    (line,) = [line for line in finished.errors.splitlines() if "waiting until" in line]
    assert re.search(r"CPU 1 \(has 2, free 0\), since \d\d:\d\d:\d\d$", line), line


def test_lost_gcs_is_reported_while_a_job_waits(files: Path, tmp_path: Path):
    yaml = config(files, tmp_path / "waiting.yaml", run_name="waiting", num_devices=1, max_steps=1)
    with ray_cluster(cpus=1) as cluster, held_cpu(cluster), started(yaml, cluster.variables) as job:
        job.wait_for_line("waiting until other work")
        cluster.kill_head("gcs_server")
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    assert_names(
        finished.result["reason"], "cluster was lost", "the GCS at", "gcs_server.out", "same command"
    )
    assert finished.errors.count("error: ") == 1
    assert "Traceback" not in finished.errors


@needs_ray_default
def test_job_waits_for_the_cluster_to_scale_up(files: Path, tmp_path: Path):
    """Only a cluster with node groups can scale up; other clusters raise an error at once."""
    yaml = config(files, tmp_path / "growing.yaml", num_epochs=1)
    with ray_cluster(cpus=1, variables={"RAY_NODE_TYPE_NAME": "workers"}) as cluster:
        dry_run = run_main(yaml, "--dry-run", "--json", variables=cluster.variables)
        with started(yaml, cluster.variables) as job:
            job.wait_for_line("waiting for the cluster to scale up: CPU 2 (has 1)")
            cluster.start_node()
            finished = job.end()
    assert dry_run.exit_code == 0, dry_run.errors
    assert_names(dry_run.result["cluster"], "scale up", "CPU 2 (has 1)")
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 5


@only_in_test_nodes
def test_commits_and_preemption_checks_do_not_deadlock(
    files: Path, tmp_path: Path, shared_cluster: RayCluster
):
    """Each step checks for a preemption notice while the committing thread calls ray.train.report, which waits for all workers."""
    yaml = config(
        files,
        tmp_path / "busy.yaml",
        run_name="busy",
        max_steps=40,
        num_epochs=None,
        valid_path=None,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 1},
    )
    finished = run_main(yaml, "--json", variables=shared_cluster.variables)
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 40


@needs_ray_default
def test_ray_metrics_contain_loss_and_throughput_of_the_run(files: Path, tmp_path: Path):
    """Ray's dashboard and Prometheus read this endpoint."""
    yaml = config(files, tmp_path / "watched.yaml", run_name="watched", num_devices=1, num_epochs=100)
    expected = [f"ray_anneal_{name}" for name in ("loss", "eval_loss", "tokens_per_second")]
    with ray_cluster(cpus=1) as cluster, started(yaml, cluster.variables) as job:

        def reported_metrics() -> dict[str, str]:
            with urllib.request.urlopen(cluster.metrics) as response:
                return dict(
                    re.findall(
                        r'^(ray_anneal_\w+){[^}]*run="watched"[^}]*} (\S+)$', response.read().decode(), re.M
                    )
                )

        job.wait_for_line("step 1/")
        job.wait_until(lambda: sorted(reported_metrics()) == sorted(expected), "Ray metrics of the run")
        assert all(float(value) > 0 for value in reported_metrics().values())
        job.process.send_signal(signal.SIGTERM)
        assert job.end().exit_code == 128 + signal.SIGTERM
