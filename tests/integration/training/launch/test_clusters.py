"""Jobs on Ray clusters: one of their own, and one that runs already."""

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig

from tests.support.jobs import PROJECT, environment, run_main, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.ray_cluster import needs_ray_default, ray_cluster
from tests.support.tiny_model import make_model, write_data
from training.loop.ray_internals import DatasetsCallback, LeanTorchTrainer, PlacementGroupCleanerCallback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clusters")
    make_model(root / "model")
    write_data(root)
    return root


def config(files: Path, path: Path, **more: object) -> Path:
    settings = {"num_devices": 2, "train_batch_size_per_device": 4, "lora_config": {"r": 4}, **more}
    return write_yaml(path, tiny_settings(files) | settings)


@pytest.mark.parametrize(
    ("is_local", "needless"),
    [(True, {DatasetsCallback, PlacementGroupCleanerCallback}), (False, {DatasetsCallback})],
    ids=["own", "joined"],
)
def test_a_run_goes_without_actors_of_rays_that_it_does_not_need(is_local: bool, needless: set[type]):
    """They would delay every start; a newer Ray that starts them otherwise shows here."""
    trainer = LeanTorchTrainer(
        lambda: None,
        is_local=is_local,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="any", failure_config=FailureConfig()),
    )
    everything = [type(callback) for callback in super(LeanTorchTrainer, trainer)._create_default_callbacks()]
    assert needless <= set(everything)
    ours = [type(callback) for callback in trainer._create_default_callbacks()]
    assert ours == [callback for callback in everything if callback not in needless]


GPUS_OF_A_WORKER = """
import os
import ray
from training.planning.endpoints import target_cluster
from training.launch.cluster import Workers, cluster
with cluster(Workers(count=1, least=1, device="cpu", each={"CPU": 1.0}, storage="/tmp/runs"), target_cluster(), progress=print):
    seen = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    print("seen:", repr(ray.get(seen.remote())))
"""


def gpus_of_a_worker(variables: dict[str, str]) -> str:
    """What a worker on CPU is told of the GPUs of a node where somebody else can see two."""
    command = [sys.executable, "-c", GPUS_OF_A_WORKER]
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


def test_workers_on_cpu_see_no_gpus_of_their_node():
    """Ray leaves them to a worker that asked for none, and Unsloth, bitsandbytes and DeepSpeed would take them."""
    assert "seen: ''" in gpus_of_a_worker({})
    with ray_cluster(cpus=1, variables={"CUDA_VISIBLE_DEVICES": "0,1"}) as cluster:
        assert "seen: ''" in gpus_of_a_worker(cluster.variables)


def test_workers_that_no_machine_can_hold(files: Path, tmp_path: Path):
    """More memory than there is would wait for ever; more CPUs are a figure that Ray is told."""
    large = config(files, tmp_path / "large.yaml", max_steps=1, num_epochs=None)
    refused = run_main(large, "worker_resources.memory=900TiB", "--json")
    assert refused.exit_code == 2, refused.errors
    assert_names(refused.errors, "2 workers", "memory")
    trained = run_main(large, "worker_resources.CPU=99", "--json")
    assert trained.exit_code == 0, trained.errors


def test_a_cluster_that_runs_already(files: Path, tmp_path: Path):
    """RAY_ADDRESS joins it, our code travels there, and it keeps running after the job."""
    joining = config(files, tmp_path / "joined.yaml", num_epochs=1)
    with ray_cluster(cpus=2) as cluster:
        unauthorized = run_main(joining, "--json", variables={"RAY_ADDRESS": cluster.address})
        asked = run_main(joining, "--dry-run", "--json", variables=cluster.variables)
        joined = run_main(joining, "--json", variables=cluster.variables)
        too_many = run_main(joining, "num_devices=3", "--json", variables=cluster.variables)
        never = run_main(joining, "num_devices=3", "--dry-run", variables=cluster.variables)
    assert unauthorized.exit_code == 2
    assert "RAY_AUTH_MODE=token" in unauthorized.errors
    assert "Traceback" not in unauthorized.errors
    assert asked.exit_code == 0, asked.errors
    assert asked.result["cluster"].startswith(f"{cluster.address} ")
    assert asked.result["config"]["num_devices"] == 2
    assert "weight_decay" in asked.result["defaults"]
    assert "num_devices" not in asked.result["defaults"]
    assert joined.exit_code == 0, joined.errors
    assert joined.result["train_steps"] == 5
    for rejected in (too_many, never):
        assert rejected.exit_code == 2
        assert_names(rejected.errors, "3 workers", "CPU 3 (has 2)")


@needs_ray_default
def test_a_cluster_that_grows(files: Path, tmp_path: Path):
    """One whose nodes come from groups may have too few of them yet: that is said, and waited for."""
    growing = config(files, tmp_path / "growing.yaml", num_epochs=1)
    with ray_cluster(cpus=1, variables={"RAY_NODE_TYPE_NAME": "workers"}) as cluster:
        asked = run_main(growing, "--dry-run", "--json", variables=cluster.variables)
        with started(growing, cluster.variables) as job:
            job.wait_for_line("waiting for the cluster to scale up: CPU 2 (has 1)")
            cluster.start_node(cpus=1)
            finished = job.end()
    assert asked.exit_code == 0, asked.errors
    assert_names(asked.result["cluster"], "scale up", "CPU 2 (has 1)")
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 5


def test_checkpoints_and_notices_do_not_wait_for_one_another(files: Path, tmp_path: Path):
    """Every step asks whether a node is taken away, while the thread that commits reports to Ray, which waits for all workers."""
    busy = config(
        files,
        tmp_path / "busy.yaml",
        run_name="busy",
        max_steps=40,
        num_epochs=None,
        valid_path=None,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 1},
    )
    with ray_cluster(cpus=2) as cluster:
        finished = run_main(busy, "--json", timeout=200, variables=cluster.variables)
    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == 40


@needs_ray_default
def test_rays_own_metrics(files: Path, tmp_path: Path):
    """Its dashboard and Prometheus show the latest loss and throughput, under the run's name."""
    watched = config(files, tmp_path / "watched.yaml", run_name="watched", num_devices=1, num_epochs=100)
    wanted = [f"ray_anneal_{name}" for name in ("loss", "eval_loss", "tokens_per_second")]
    with ray_cluster(cpus=1) as cluster, started(watched, cluster.variables) as job:

        def told() -> dict[str, str]:
            with urllib.request.urlopen(cluster.metrics) as answer:
                return dict(
                    re.findall(
                        r'^(ray_anneal_\w+){[^}]*run="watched"[^}]*} (\S+)$', answer.read().decode(), re.M
                    )
                )

        job.wait_for_line("step 1/")
        job.wait_until(lambda: sorted(told()) == sorted(wanted), "metrics of Ray's")
        assert all(float(figure) > 0 for figure in told().values())
        job.process.send_signal(signal.SIGTERM)
        assert job.end().exit_code == 128 + signal.SIGTERM
