"""Jobs on two nodes have the losses of one worker, and continue when a node is lost, joins or is preempted.

Each node has its own cache and scratch directory. In the first test, one node also has its own network, cannot read the driver's
files, and shares only a bucket with the other node.
"""

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
from tests.support.grids import only_in_test_nodes
from tests.support.jobs import CompletedCommand, read_metrics, run_main, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.namespaces import network_namespace
from tests.support.own_buckets import set_up_own_bucket
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.tiny_model import make_model, write_data
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 10
LONG = 120
RANGE = {"min": 1, "max": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "one": {"num_devices": 1, "train_batch_size_per_device": 8},
    "ddp": {"num_devices": 2, "train_batch_size_per_device": 4},
    "zero_3": {"num_devices": 2, "train_batch_size_per_device": 4, "deepspeed": "zero_3"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model and rows on this machine; the isolated node cannot read them."""
    directory = tmp_path_factory.mktemp("two_nodes")
    make_model(directory / "model")
    write_data(directory, train_rows=76)
    return directory


@dataclass(frozen=True)
class TwoNodes:
    """A cluster of two nodes, and the URI of the bucket that both can access."""

    cluster: RayCluster
    bucket_uri: str


@pytest.fixture(scope="module")
def two_nodes(files: Path, bucket: EmbeddedBucket) -> Iterator[TwoNodes]:
    """Start a head on this machine and a node in a network namespace, which can access the head and the bucket but no files."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        network_namespace(hidden=files) as namespace,
        bucket_proxy(bucket.endpoint, address=namespace.host) as proxy,
    ):
        bucket_uri = set_up_own_bucket(monkeypatch, bucket, "apart")
        store = open_store(bucket_uri)
        store.upload_many({f"model/{path.name}": path for path in (files / "model").iterdir()})
        store.upload_many({f"data/{name}": files / name for name in ("train.jsonl", "valid.jsonl")})
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        # Without it, Gloo resolves the same host name on both nodes.
        gloo_interface = {"GLOO_SOCKET_IFNAME": namespace.interface}
        with ray_cluster(cpus=1, host=namespace.host, variables=gloo_interface) as cluster:
            cluster.start_node(within=namespace)
            yield TwoNodes(cluster, bucket_uri)


def train(nodes: TwoNodes, directory: Path, name: str, *, on_cluster: bool) -> tuple[CompletedCommand, Store]:
    settings = tiny_settings(directory) | {
        "model_id": f"{nodes.bucket_uri}/model",
        "train_path": f"{nodes.bucket_uri}/data/train.jsonl",
        "valid_path": f"{nodes.bucket_uri}/data/valid.jsonl",
        "storage_path": f"{nodes.bucket_uri}/runs",
        "run_name": name,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
        **STRATEGIES[name],
    }
    del settings["output_dir"]
    config = write_yaml(directory / f"{name}.yaml", settings)
    variables = {"XDG_CACHE_HOME": str(directory / "driver-cache")}
    finished = run_main(
        config, "--json", variables=variables | (nodes.cluster.variables if on_cluster else {})
    )
    assert finished.exit_code == 0, finished.errors
    return finished, open_store(finished.result["run_uri"])


def losses_of(store: Store) -> tuple[list[float], list[float]]:
    """Return the losses of all steps and of all evaluations."""
    metrics = reading.read_metrics(store)
    return (
        [line.loss for line in metrics if line.loss is not None],
        [line.eval_loss for line in metrics if line.eval_loss is not None],
    )


@pytest.fixture(scope="module")
def one_worker_losses(
    two_nodes: TwoNodes, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float]]:
    return losses_of(train(two_nodes, tmp_path_factory.mktemp("one"), "one", on_cluster=False)[1])


@only_in_test_nodes
@pytest.mark.parametrize("strategy", ["ddp", "zero_3"])
def test_two_nodes_have_the_losses_of_one_worker(
    strategy: str, two_nodes: TwoNodes, one_worker_losses: tuple[list[float], list[float]], tmp_path: Path
):
    """Each node downloads model and rows into its own cache, and uploads its part of the checkpoints."""
    _, run = train(two_nodes, tmp_path, strategy, on_cluster=True)
    losses, eval_losses = losses_of(run)
    assert len(losses) == STEPS
    assert losses[0] - losses[-1] > 0.05
    assert losses == pytest.approx(one_worker_losses[0], abs=1e-4)
    assert eval_losses == pytest.approx(one_worker_losses[1], abs=1e-4)
    head, other = (cache / "anneal" for cache in two_nodes.cluster.caches())
    for node in (head, other):
        assert list(node.glob("cache/models/**/model.safetensors")), node
        assert list(node.glob(f"logs/{strategy}/worker-?.log")), node
    assert not (tmp_path / "driver-cache" / "anneal" / "logs" / strategy / "worker-0.log").exists()
    manifests, damage = reading.survey(run)
    assert damage == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in manifests[-1].files}


def write_long_config(files: Path, path: Path, name: str, **more: Any) -> Path:
    """Write the YAML of a run with many steps: all nodes share its files, and each node has its own scratch directory."""
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
    """Return step -> loss; fail if a step is missing or repeated."""
    lines = [line for line in read_metrics(files / "runs" / name) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def head() -> Iterator[RayCluster]:
    """Start the head of a cluster whose other nodes come and go in each test."""
    with ray_cluster(cpus=1) as cluster:
        yield cluster


@only_in_test_nodes
@pytest.mark.parametrize("parallelism", ["ddp", "zero_3"])
def test_elastic_run_completes_when_a_node_is_lost(
    parallelism: str, head: RayCluster, files: Path, tmp_path: Path
):
    """With fewer workers, each step still has the same rows, so the losses equal those of an uninterrupted run."""
    own_cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    more = {"deepspeed": parallelism} if parallelism != "ddp" else {}
    before, name = f"uninterrupted-{parallelism}", f"elastic-{parallelism}"
    yaml = write_long_config(files, tmp_path / "uninterrupted.yaml", before, num_devices=2, **more)
    uninterrupted = run_main(yaml, "--json", variables=own_cache)
    assert uninterrupted.exit_code == 0, uninterrupted.errors
    config = write_long_config(
        files, tmp_path / "elastic.yaml", name, num_devices=RANGE, max_failures=1, **more
    )
    lost = head.start_node()
    with started(config, head.variables | own_cache) as job:
        job.wait_for_line("step 50/")
        head.kill(lost)
        finished = job.end()
    for cache in (head.caches()[0], head.caches()[-1]):
        assert (cache / "anneal" / "runs" / name).exists()
    assert finished.exit_code == 0, finished.errors
    assert "1 of 2 workers" in finished.errors
    assert ("converting the checkpoint, which 2 workers saved, for 1" in finished.errors) == (
        parallelism != "ddp"
    )
    assert finished.result["train_steps"] == LONG
    assert finished.result["tokens"] == uninterrupted.result["tokens"]
    losses, expected = steps_of(files, name), steps_of(files, before)
    assert list(losses.values()) == pytest.approx(list(expected.values()), abs=1e-3)
    run = open_store(str(files / "runs" / name))
    assert [manifest.world_size for manifest in reading.committed(run)][-1] == 1
    assert run_main_quickly(config, "--dry-run", variables=own_cache).exit_code == 0, (
        "the unchanged config must still pass a dry run"
    )
    changed = run_main_quickly(config, "num_devices=1", "--dry-run", variables=own_cache)
    assert changed.exit_code == 2
    assert "num_devices: {'min': 1, 'max': 2} -> 1" in changed.errors


@only_in_test_nodes
def test_lost_node_fails_a_run_without_retries_and_the_same_command_resumes(
    head: RayCluster, files: Path, tmp_path: Path
):
    steps = 30
    config = write_long_config(
        files,
        tmp_path / "lost.yaml",
        "lost",
        num_devices=2,
        max_failures=0,
        max_steps=steps,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 5},
    )
    variables = head.variables | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    lost = head.start_node()
    with started(config, variables) as job:
        job.wait_for_line("step 12/")
        head.kill_raylet(lost)
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "worker lost", "node")
    assert_names(finished.errors, "resume from the last checkpoint with the same command")
    assert "Traceback" not in finished.errors
    head.start_node()
    recovered = run_main(config, "--json", variables=variables)
    assert recovered.exit_code == 0, recovered.errors
    assert recovered.result["train_steps"] == steps
    assert list(steps_of(files, "lost")) == list(range(1, steps + 1))


@only_in_test_nodes
def test_run_that_needs_both_nodes_waits_for_a_lost_node(files: Path, tmp_path: Path):
    """It prints the missing resources, resumes when a node joins, and exits on a signal while it waits again."""
    config = write_long_config(
        files, tmp_path / "waiting.yaml", "waiting", num_devices=2, max_steps=2000, max_failures=2
    )
    waiting = "CPU 2 (has 1)"
    with ray_cluster(cpus=1) as cluster:
        lost = cluster.start_node()
        with started(config, cluster.variables | {"XDG_CACHE_HOME": str(tmp_path / "cache")}) as job:
            job.wait_for_line("checkpoint ")
            cluster.kill(lost)
            job.wait_for_line(waiting)
            errors_before = job.errors
            lost = cluster.start_node()
            job.wait_until(
                lambda: "checkpoint " in job.errors[len(errors_before) :], "a checkpoint of both nodes"
            )
            cluster.kill(lost)
            job.wait_until(lambda: job.errors.count(waiting) == 2, f"{waiting} again")
            job.process.send_signal(signal.SIGTERM)
            finished = job.end()
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert finished.result["status"] == "stopped"
    assert finished.result["last_checkpoint"] is not None
    assert "Traceback" not in finished.errors


@only_in_test_nodes
def test_joining_node_is_used_after_an_extra_checkpoint(files: Path, tmp_path: Path):
    """No step is trained twice, although no checkpoint was due."""
    config = write_long_config(
        files,
        tmp_path / "growing.yaml",
        "growing",
        num_devices=RANGE,
        lora_config={"r": 4, "lora_dropout": 0.1},
        max_steps=100_000,
        num_checkpoints_to_keep=9,
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 100_000},
    )
    own_cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with ray_cluster(cpus=1) as cluster, started(config, cluster.variables | own_cache) as job:
        job.wait_for_line("step 10/")
        errors_of_one_node = job.errors
        cluster.start_node()
        job.wait_for_line("… restarting with more workers")
        length_before = len(job.errors)
        job.wait_until(
            lambda: re.search(r"^step \d+/", job.errors[length_before:], re.M) is not None,
            "a step on both nodes",
        )
        job.process.send_signal(signal.SIGTERM)
        finished = job.end()
    assert "1 of 2 workers" in errors_of_one_node
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    trained = [int(step) for step in re.findall(r"^step (\d+)/", finished.errors, re.M)]
    assert trained == list(range(1, len(trained) + 1))
    manifests = reading.committed(open_store(str(files / "runs" / "growing")))
    assert [manifest.world_size for manifest in manifests] == [1, 2]
    assert manifests[-1].step == len(trained)


@only_in_test_nodes
def test_preempted_node_is_replaced_after_a_checkpoint(files: Path, tmp_path: Path):
    """The preemption notice triggers a commit. Ray then restarts the workers on other nodes, and counts no failure."""
    at_the_end = {"unit": "steps", "frequency": LONG}
    config = write_long_config(
        files,
        tmp_path / "preempted.yaml",
        "preempted",
        num_devices=2,
        num_checkpoints_to_keep=9,
        checkpoint_and_evaluation_frequency=at_the_end,
    )
    own_cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with ray_cluster(cpus=1) as cluster:
        preempted = cluster.start_node()
        with started(config, cluster.variables | own_cache) as job:
            job.wait_for_line("step 10/")
            cluster.start_node()
            cluster.preempt(preempted, seconds=8)
            finished = job.end()
    assert finished.exit_code == 0, finished.errors
    first, last = (
        manifest.step for manifest in reading.committed(open_store(str(files / "runs" / "preempted")))
    )
    assert 10 <= first < LONG
    assert last == LONG
    assert list(steps_of(files, "preempted")) == list(range(1, LONG + 1))
    assert f"step {first + 1}/" in finished.errors.split("step 10/", 1)[1]
