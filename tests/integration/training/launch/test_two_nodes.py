"""Jobs on two nodes that share nothing but a bucket: the same losses as on one, and the run continues when one of them is lost.

Every node has its own cache and scratch directory. In the first tests one of them has a network of its own as well, and does not
see the driver's files.
"""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runs import reading
from tests.support.bucket_proxy import bucket_proxy
from tests.support.front_door import run_main_quickly
from tests.support.jobs import Finished, read_metrics, run_main, started, tiny_settings, write_yaml
from tests.support.namespaces import network_namespace
from tests.support.own_buckets import reach_as_a_user
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.tiny_model import make_model, write_data
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
not_in_the_sample = pytest.mark.skipif(not os.environ.get("ALL_NODES"), reason="`make test-nodes` runs it")

STEPS = 10
LONG = 120
RANGE = {"min": 1, "max": 2}
SPREADS: dict[str, dict[str, Any]] = {
    "one": {"num_devices": 1, "train_batch_size_per_device": 8},
    "ddp": {"num_devices": 2, "train_batch_size_per_device": 4},
    "zero_3": {"num_devices": 2, "train_batch_size_per_device": 4, "deepspeed": "zero_3"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine has, and the other does not see."""
    directory = tmp_path_factory.mktemp("two_nodes")
    make_model(directory / "model")
    write_data(directory, train_rows=76)
    return directory


@dataclass(frozen=True)
class TwoNodes:
    """A cluster of two, and the bucket that both reach."""

    cluster: RayCluster
    place: str


@pytest.fixture(scope="module")
def apart(files: Path, bucket: EmbeddedBucket) -> Iterator[TwoNodes]:
    """A head on this machine, and a node behind a cable: it reaches the head and the bucket there, and no file."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        network_namespace(hidden=files) as namespace,
        bucket_proxy(bucket.endpoint, address=namespace.host) as proxy,
    ):
        place = reach_as_a_user(monkeypatch, bucket, "apart")
        store = open_store(place)
        store.upload_many({f"model/{path.name}": path for path in (files / "model").iterdir()})
        store.upload_many({f"data/{name}": files / name for name in ("train.jsonl", "valid.jsonl")})
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        cable = {"GLOO_SOCKET_IFNAME": namespace.interface}  # both would find one host name otherwise
        with ray_cluster(cpus=1, host=namespace.host, variables=cable) as cluster:
            cluster.start_node(cpus=1, within=namespace)
            yield TwoNodes(cluster, place)


def train(nodes: TwoNodes, directory: Path, name: str, *, on_cluster: bool) -> tuple[Finished, Store]:
    settings = tiny_settings(directory) | {
        "model_id": f"{nodes.place}/model",
        "train_path": f"{nodes.place}/data/train.jsonl",
        "valid_path": f"{nodes.place}/data/valid.jsonl",
        "storage_path": f"{nodes.place}/runs",
        "run_name": name,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
        **SPREADS[name],
    }
    del settings["output_dir"]
    config = write_yaml(directory / f"{name}.yaml", settings)
    variables = {"XDG_CACHE_HOME": str(directory / "cache-of-the-driver")}
    finished = run_main(
        config, "--json", variables=variables | (nodes.cluster.variables if on_cluster else {})
    )
    assert finished.exit_code == 0, finished.errors
    return finished, open_store(finished.result["run_uri"])


def losses_of(store: Store) -> tuple[list[float], list[float]]:
    """(of each step, of each evaluation)."""
    metrics = reading.read_metrics(store)
    return (
        [line.loss for line in metrics if line.loss is not None],
        [line.eval_loss for line in metrics if line.eval_loss is not None],
    )


@pytest.fixture(scope="module")
def on_one_worker(
    apart: TwoNodes, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float]]:
    return losses_of(train(apart, tmp_path_factory.mktemp("one"), "one", on_cluster=False)[1])


@not_in_the_sample
@pytest.mark.parametrize("spread", ["ddp", "zero_3"])
def test_losses_across_two_machines_are_those_of_one_worker(
    spread: str, apart: TwoNodes, on_one_worker: tuple[list[float], list[float]], tmp_path: Path
):
    """Each has fetched the model and the rows itself, into its own cache, and its part of the checkpoints has arrived."""
    _, run = train(apart, tmp_path, spread, on_cluster=True)
    losses, eval_losses = losses_of(run)
    assert len(losses) == STEPS
    assert losses[0] - losses[-1] > 0.05
    assert losses == pytest.approx(on_one_worker[0], abs=1e-4)
    assert eval_losses == pytest.approx(on_one_worker[1], abs=1e-4)
    head, other = (cache / "anneal" for cache in apart.cluster.caches())
    for node in (head, other):
        assert list(node.glob("cache/models/**/model.safetensors")), node
        assert list(node.glob(f"logs/{spread}/worker-?.log")), node
    assert not (tmp_path / "cache-of-the-driver" / "anneal" / "logs" / spread / "worker-0.log").exists()
    manifests, damage = reading.survey(run)
    assert damage == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in manifests[-1].files}


def lasting(files: Path, path: Path, name: str, **more: Any) -> Path:
    """A run of many steps whose files all nodes reach, and whose scratch is each node's own."""
    settings = tiny_settings(files) | {
        "run_name": name,
        "max_steps": LONG,
        "train_batch_size_per_device": 4,
        "lora_config": {"r": 4},
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 20},
        **more,
    }
    del settings["output_dir"]
    return write_yaml(path, settings)


def steps_of(files: Path, name: str) -> dict[int, float]:
    """Step -> loss; each step stands there once."""
    lines = [line for line in read_metrics(files / "runs" / name) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


def test_a_run_with_a_range_of_devices_finishes_when_a_node_is_lost(files: Path, tmp_path: Path):
    """From the latest checkpoint, with the same rows per step: the losses are those of a run that lost nothing."""
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    yaml = lasting(files, tmp_path / "whole.yaml", "whole", num_devices=2)
    whole = run_main(yaml, "--json", variables=own)
    assert whole.exit_code == 0, whole.errors
    config = lasting(files, tmp_path / "elastic.yaml", "elastic", num_devices=RANGE, max_failures=1)
    with ray_cluster(cpus=1) as cluster:
        lost = cluster.start_node(cpus=1)
        with started(config, cluster.variables | own) as job:
            job.wait_for_line("step 50/")
            cluster.kill(lost)
            finished = job.end()
        assert all((cache / "anneal" / "runs" / "elastic").exists() for cache in cluster.caches())
    assert finished.exit_code == 0, finished.errors
    assert "1 of 2 workers" in finished.errors
    assert finished.result["train_steps"] == LONG
    assert finished.result["tokens"] == whole.result["tokens"]
    ours, theirs = steps_of(files, "elastic"), steps_of(files, "whole")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-3)
    run = open_store(str(files / "runs" / "elastic"))
    assert [manifest.world_size for manifest in reading.committed(run)][-1] == 1
    assert run_main_quickly(config, "--dry-run", variables=own).exit_code == 0, (
        "it may be looked at as before"
    )
    changed = run_main_quickly(config, "num_devices=1", "--dry-run", variables=own)
    assert changed.exit_code == 2
    assert "num_devices: {'min': 1, 'max': 2} -> 1" in changed.errors


@not_in_the_sample
def test_a_run_that_needs_both_nodes_waits_for_one(files: Path, tmp_path: Path):
    """It prints the missing resources, resumes when a node joins, and exits on a signal while it waits again."""
    config = lasting(
        files, tmp_path / "waiting.yaml", "waiting", num_devices=2, max_steps=2000, max_failures=2
    )
    waiting = "CPU 2 (has 1)"
    with ray_cluster(cpus=1) as cluster:
        lost = cluster.start_node(cpus=1)
        with started(config, cluster.variables | {"XDG_CACHE_HOME": str(tmp_path / "cache")}) as job:
            job.wait_for_line("checkpoint ")
            cluster.kill(lost)
            job.wait_for_line(waiting)
            before = job.errors
            lost = cluster.start_node(cpus=1)
            job.wait_until(lambda: "checkpoint " in job.errors[len(before) :], "a checkpoint of both again")
            cluster.kill(lost)
            job.wait_until(lambda: job.errors.count(waiting) == 2, f"{waiting} again")
            job.process.send_signal(signal.SIGTERM)
            finished = job.end()
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert finished.result["status"] == "stopped"
    assert finished.result["last_checkpoint"] is not None
    assert "Traceback" not in finished.errors


@not_in_the_sample
def test_a_joining_node_is_used_after_a_checkpoint(files: Path, tmp_path: Path):
    """No step is trained twice for it, though no checkpoint was due."""
    config = lasting(
        files,
        tmp_path / "growing.yaml",
        "growing",
        num_devices=RANGE,
        lora_config={"r": 4, "lora_dropout": 0.1},
        max_steps=100_000,
        num_checkpoints_to_keep=9,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 100_000},
    )
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with ray_cluster(cpus=1) as cluster, started(config, cluster.variables | own) as job:
        job.wait_for_line("step 10/")
        alone = job.errors
        cluster.start_node(cpus=1)
        job.wait_for_line("… making room for more workers")
        before = len(job.errors)
        job.wait_until(
            lambda: re.search(r"^step \d+/", job.errors[before:], re.M) is not None, "a step of both"
        )
        job.process.send_signal(signal.SIGTERM)
        finished = job.end()
    assert "1 of 2 workers" in alone
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    trained = [int(step) for step in re.findall(r"^step (\d+)/", finished.errors, re.M)]
    assert trained == list(range(1, len(trained) + 1))
    manifests = reading.committed(open_store(str(files / "runs" / "growing")))
    assert [manifest.world_size for manifest in manifests] == [1, 2]
    assert manifests[-1].step == len(trained)


@not_in_the_sample
def test_a_preempted_node_is_replaced_after_a_checkpoint(files: Path, tmp_path: Path):
    """Its notice commits a checkpoint, and Ray brings the workers back on other nodes, from there; no failure is counted."""
    rarely = {"unit": "steps", "frequency": LONG}
    config = lasting(
        files,
        tmp_path / "taken.yaml",
        "taken",
        num_devices=2,
        num_checkpoints_to_keep=9,
        checkpoint_and_evaluation_frequency=rarely,
    )
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with ray_cluster(cpus=1) as cluster:
        taken = cluster.start_node(cpus=1)
        with started(config, cluster.variables | own) as job:
            job.wait_for_line("step 10/")
            cluster.start_node(cpus=1)
            cluster.preempt(taken, seconds=8)
            finished = job.end()
    assert finished.exit_code == 0, finished.errors
    first, last = (manifest.step for manifest in reading.committed(open_store(str(files / "runs" / "taken"))))
    assert 10 <= first < LONG
    assert last == LONG
    assert list(steps_of(files, "taken")) == list(range(1, LONG + 1))
    assert f"step {first + 1}/" in finished.errors.split("step 10/", 1)[1]
