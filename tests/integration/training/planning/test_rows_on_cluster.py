"""A plan lets the cluster prepare large sources only after all cheap checks, and only rows that every node can read."""

import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_model_and_data
from training.data import shards
from training.data.prepared import PREPARED, data_files, fetch_prepared
from training.launch.row_tasks import rows_on_cluster
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan
from utils.errors import AnnealError
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

CLUSTER = ClusterTarget("127.0.0.1:6379")


@pytest.fixture
def settings(
    bucket: EmbeddedBucket, bucket_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Any]:
    """Return the settings of a run whose rows and storage are in a user's bucket; its shards have a few rows each."""
    monkeypatch.setattr(shards, "MIN_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    files = make_model_and_data(tmp_path)
    uri = f"{set_up_own_bucket(monkeypatch, bucket, 'planned')}/{bucket_uri.rpartition('/')[2]}"
    open_store(uri).upload_many({name: files / name for name in ("train.jsonl", "valid.jsonl")})
    return tiny_settings(files) | {
        "train_path": f"{uri}/train.jsonl",
        "valid_path": f"{uri}/valid.jsonl",
        "storage_path": f"{uri}/runs",
        "max_steps": 1,
        "train_batch_size_per_device": 1,
    }


def plan(
    tmp_path: Path, settings: dict[str, Any], lost_disk: str | None = None
) -> tuple[list[str], str, Any]:
    """Plan a run, with tasks that run in this process; return the work that they did, the error and the plan.

    Args:
        tmp_path: Directory for the YAML.
        settings: The YAML.
        lost_disk: Directory for temporary files of the node that prepares the third shard; None: the system's.
    """
    calls: list[str] = []

    def run(work: Any, items: Sequence[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            calls.append(work.__name__)
            on_node = work
            if lost_disk and work.__name__ == "prepare" and number == 2:
                on_node = replace(work.__self__, scratch=Path(lost_disk)).prepare
            yield on_node(item)

    @contextmanager
    def connect() -> Iterator[shards.ShardRun]:
        calls.append("connect")
        yield run
        calls.append("disconnect")

    loaded = load_config(write_yaml(tmp_path / "run.yaml", settings))
    try:
        made, *_ = make_plan(loaded, target=CLUSTER, on_cluster=connect)
    except AnnealError as error:
        return calls, str(error), None
    return calls, "", made


def test_nodes_prepare_the_rows_and_store_them(settings: dict[str, Any], tmp_path: Path):
    calls, error, made = plan(tmp_path, settings)
    assert error == ""
    assert set(calls) == {"connect", "find_schema", "prepare", "read_row", "disconnect"}
    assert calls.count("connect") == calls.count("disconnect") == 2, "one Ray job for each set of rows"
    assert calls[-1] == "disconnect", "the rest of the plan needs no cluster"
    on_worker = fetch_prepared(made.train, tmp_path / "worker", made.prepared)
    valid = fetch_prepared(made.valid, tmp_path / "worker", made.prepared)
    assert calls.count("prepare") == sum(len(data_files(rows.directory)) for rows in (on_worker, valid)) > 4
    assert len(on_worker.dataset()) == on_worker.summary.rows == 40
    assert not list((tmp_path / "scratch").glob("**/data*.arrow")), "the driver has no tokens"
    assert plan(tmp_path, settings)[0] == [], "prepared once"


@pytest.mark.slow
def test_leftovers_of_a_killed_driver_are_replaced(settings: dict[str, Any], tmp_path: Path):
    """Another version may have cut more shards, whose tokens must not become rows."""
    made = plan(tmp_path, settings)[2]
    store = open_store(f"{made.prepared}/{made.train}")
    expected = {item.key: store.read(item.key) for item in store.list()}
    store.delete(["summary.json"])
    for name in ("data-00001.arrow", "data-99999.arrow", "parts/index-99999.arrow"):
        store.write(name, expected["data-00000.arrow"])
    shutil.rmtree(tmp_path / "scratch")
    assert "prepare" in plan(tmp_path, settings)[0]
    assert {item.key: store.read(item.key) for item in store.list()} == expected


def test_node_that_cannot_write_is_named_and_its_shards_are_removed(settings: dict[str, Any], tmp_path: Path):
    calls, error, _ = plan(tmp_path, settings, lost_disk=str(tmp_path / "lost"))
    assert calls.count("prepare") == 3
    assert_names(error, settings["train_path"], socket.gethostname(), str(tmp_path / "lost"), "output_dir")
    store = open_store(f"{settings['storage_path']}/{PREPARED}")
    assert [item.key for item in store.list() if item.key.endswith(".arrow")] == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_id", "/no/such/model", "/no/such/model"),
        ("storage_path", "s3://no-such-bucket/runs", "storage_path"),
        ("lora_config", {"target_modules": ["no_such_module"]}, "target_modules"),
    ],
    ids=["model", "storage", "adapter"],
)
def test_cluster_is_asked_for_nothing_before_the_cheap_checks(
    settings: dict[str, Any], tmp_path: Path, key: str, value: Any, named: str
):
    calls, error, _ = plan(tmp_path, settings | {key: value})
    assert named in error
    assert calls == []


@pytest.mark.parametrize(
    "key", ["train_path", "storage_path", "trust_remote_code"], ids=lambda key: f"other {key}"
)
def test_rows_that_other_nodes_cannot_read_are_prepared_here(
    settings: dict[str, Any], tmp_path: Path, key: str
):
    here = {
        "train_path": str(tmp_path / "train.jsonl"),
        "storage_path": str(tmp_path / "runs"),
        "trust_remote_code": True,
    }
    calls, error, made = plan(tmp_path, settings | {"valid_path": None, key: here[key]})
    assert error == ""
    assert calls == []
    assert list((tmp_path / "scratch" / "cache" / "prepared" / made.train).glob("data-*.arrow"))


def test_local_run_has_no_cluster_to_prepare_rows(settings: dict[str, Any], tmp_path: Path):
    config = load_config(write_yaml(tmp_path / "run.yaml", settings)).config
    with rows_on_cluster(config, ClusterTarget(None)) as run:
        assert run is None
