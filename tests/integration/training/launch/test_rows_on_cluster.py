"""The nodes of a cluster prepare large sources in shards: the files are those of one machine, also if a node is lost meanwhile.

The nodes and the driver have their own cache directories, and share a bucket.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import small_shard_variables
from tests.support.grids import only_in_test_nodes
from tests.support.jobs import CompletedCommand, run_main, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.tiny_model import make_model
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 20_000
SHARD_BYTES = 100_000
LEAST_SHARDS = 30


@pytest.fixture(scope="module")
def bucket_uri(bucket: EmbeddedBucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URI of a bucket with rows: one large file and a directory of small ones."""
    directory = tmp_path_factory.mktemp("rows")
    train = directory / "train.jsonl"
    lines = [
        json.dumps({"prompt": f"What is {number} + 1?", "completion": f"{number + 1} " * (number % 40 + 1)})
        + "\n"
        for number in range(ROWS)
    ]
    lines[13_333] = '{"prompt": "What is 13333 + 1?", "completion": ""}\n'
    train.write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        uri = set_up_own_bucket(patch, bucket, "shards")
        files = {f"many/{number}.jsonl": directory / f"{number}.jsonl" for number in range(9)}
        for number, path in enumerate(files.values()):
            path.write_text("".join(lines[number * 1000 : (number + 1) * 1000]))
        open_store(uri).upload_many({"train.jsonl": train, **files})
        yield uri


@pytest.fixture(scope="module")
def cluster(bucket_uri: str) -> Iterator[RayCluster]:
    with ray_cluster(cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory / "model")
    return directory


def settings_of(files: Path, uri: str, runs: str, **changes: Any) -> dict[str, Any]:
    settings = tiny_settings(files) | {
        "train_path": [f"{uri}/train.jsonl", f"{uri}/many/*.jsonl"],
        "valid_path": f"{uri}/many/0.jsonl",
        "max_valid_rows": 8,
        "storage_path": f"{uri}/{runs}",
        "run_name": "run",
        "max_steps": 2,
        "bad_rows": "skip",
        "train_batch_size_per_device": 4,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2},
        **changes,
    }
    del settings["output_dir"]
    return settings


def prepared_files(store: Store) -> dict[str, bytes]:
    return {item.key: store.read(item.key) for item in store.list("prepared/")}


def test_lost_node_costs_its_shards_only_and_the_files_are_those_of_one_machine(
    cluster: RayCluster, files: Path, bucket_uri: str, tmp_path: Path
):
    small = small_shard_variables(SHARD_BYTES)
    config = write_yaml(tmp_path / "cluster.yaml", settings_of(files, bucket_uri, "on-cluster"))
    store = open_store(f"{bucket_uri}/on-cluster")
    own_cache = {"XDG_CACHE_HOME": str(tmp_path / "driver-cache")}

    def uploaded() -> int:
        return sum("/data-" in item.key for item in store.list("prepared/"))

    lost = cluster.start_node()
    with started(config, cluster.variables | small | own_cache) as job:
        of_lost = cluster.caches()[-1] / "anneal"
        job.wait_until(lambda: uploaded() >= 4 and of_lost.exists(), "shards in the bucket, of both nodes")
        cluster.kill(lost)
        before = uploaded()
        finished = job.end()
    assert finished.exit_code == 0, finished.errors
    found = prepared_files(store)
    shards = sum("/data-" in name for name in found)
    assert shards > LEAST_SHARDS
    assert before < shards, "the node was lost after the last shard"
    head, other = cluster.caches()
    assert (head / "anneal").exists() and (other / "anneal").exists(), "both nodes had shards"

    here = write_yaml(tmp_path / "here.yaml", settings_of(files, bucket_uri, "here"))
    finished_here = run_main(here, "--json", variables=small | {"XDG_CACHE_HOME": str(tmp_path / "here")})
    assert finished_here.exit_code == 0, finished_here.errors
    expected = prepared_files(open_store(f"{bucket_uri}/here"))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert found.keys() - {name for name in found if "/data" in name} == {
        f"prepared/{key}/{name}"
        for key in {name.split("/")[1] for name in found}
        for name in ("index.arrow", "skipped_rows.jsonl", "summary.json")
    }
    assert finished.result["last_checkpoint"] and finished.result["tokens"] == finished_here.result["tokens"]
    skipped = store.read("run/skipped_rows.jsonl").decode()
    assert_names(skipped, f"{bucket_uri}/train.jsonl", '"row": 13334', "empty")

    driver = tmp_path / "driver-cache" / "anneal" / "cache"
    assert not list(driver.glob("**/data-*.arrow")), "no tokens pass the driver"
    assert len(list(driver.glob("**/index.arrow"))) == 1, (
        "only the index of the validation rows, which it prepared"
    )
    assert not list(driver.glob("data/**/train.jsonl")), "the driver reads no rows of large sources"
    assert list((head / "anneal" / "cache").glob("**/data-*.arrow")), "the node that trains has the tokens"


@only_in_test_nodes
def test_faults_of_rows_are_reported_as_by_one_machine(
    cluster: RayCluster, files: Path, bucket_uri: str, tmp_path: Path
):
    def run(name: str, variables: dict[str, str]) -> CompletedCommand:
        config = write_yaml(tmp_path / f"{name}.yaml", settings_of(files, bucket_uri, name, bad_rows="error"))
        return run_main(
            config,
            "--json",
            variables=variables
            | small_shard_variables(SHARD_BYTES)
            | {"XDG_CACHE_HOME": str(tmp_path / name)},
        )

    jobs_before = cluster.count_jobs()
    on_cluster = run("faulty", cluster.variables)
    assert cluster.count_jobs() - jobs_before == 2, (
        "the rows of two sources are one job; the count is the other"
    )
    here = run("faulty-here", {})
    (line,) = [line for line in on_cluster.errors.splitlines() if line.startswith("error: ")]
    assert on_cluster.exit_code == here.exit_code == 2
    assert on_cluster.errors[on_cluster.errors.index(line) :] == here.errors[here.errors.index(line) :]
    assert_names(on_cluster.errors, "1 of 29,000 rows", f"{bucket_uri}/train.jsonl:13334", "empty")
    assert open_store(f"{bucket_uri}/faulty").list("prepared/") == [], "rejected rows leave nothing"
