"""A plan lets the cluster work on large sources only after all cheap checks, and only on rows that every node can read.

What the driver receives then does not grow with the rows.
"""

import pickle
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_model_and_data, write_data
from training.data import shards
from training.data.prepared import PREPARED, PreparedData, data_files, fetch_prepared
from training.data.report import DataReport
from training.data.row_index import INDEX_FILE
from training.launch.row_tasks import rows_on_cluster
from training.planning import index_figures
from training.planning.endpoints import ClusterTarget
from training.planning.plan import RunPlan
from training.planning.planner import make_plan
from utils.errors import AnnealError
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.s3 import S3Store

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


@dataclass
class Outcome:
    """A plan, or its error, and what the driver did and received for it. Its tasks run in this process."""

    calls: list[str] = field(default_factory=list)
    """Tasks and connections, in their order."""
    received: int = 0
    """Bytes of the results of tasks, and of what the driver read from the bucket."""
    error: str = ""
    made: Any = None
    """The RunPlan."""
    report: Any = None
    prepared: Sequence[PreparedData] = ()
    is_in_task: bool = False

    def received_outside_of_tasks(self, size: int) -> None:
        """Count bytes that were read from the bucket, unless a task has read them."""
        self.received += 0 if self.is_in_task else size


def count_reads(patch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    """Count the bytes that the driver reads from the bucket."""
    get, read_into = S3Store._get, S3Store.read_into

    def counting_get(self: Any, key: str, **options: str) -> bytes:
        content = get(self, key, **options)
        outcome.received_outside_of_tasks(len(content))
        return content

    def counting_read_into(self: Any, item: Any, start: int, length: int, take: Any) -> bool:
        outcome.received_outside_of_tasks(length)
        return read_into(self, item, start, length, take)

    patch.setattr(S3Store, "_get", counting_get)
    patch.setattr(S3Store, "read_into", counting_read_into)


def plan(
    directory: Path,
    settings: dict[str, Any],
    *,
    lost_disk: str | None = None,
    times: int = 1,
    has_cluster: bool = True,
) -> Outcome:
    """Plan a run.

    Args:
        directory: Directory for the YAML and for the node that runs the tasks.
        settings: The YAML.
        lost_disk: Directory for temporary files of the node that prepares the third shard; None: as for the others.
        times: How often each task is run, as if its node had been lost after it had stored its files.
        has_cluster: False to prepare all rows in processes of this machine.
    """
    outcome = Outcome()
    node = directory / "node"
    node.mkdir(parents=True, exist_ok=True)

    def run(work: Any, items: Sequence[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            outcome.calls.append(work.__name__)
            is_lost = lost_disk and work.__name__ == "prepare" and number == 2
            on_node = replace(work.__self__, scratch=Path(lost_disk or "") if is_lost else node)
            outcome.is_in_task = True
            try:
                *_, result = (getattr(on_node, work.__name__)(item) for _ in range(times))
            finally:
                outcome.is_in_task = False
            outcome.received += len(pickle.dumps(result))
            yield result

    @contextmanager
    def connect() -> Iterator[shards.ShardRun]:
        outcome.calls.append("connect")
        yield run
        outcome.calls.append("disconnect")

    loaded = load_config(write_yaml(directory / "run.yaml", settings))
    with pytest.MonkeyPatch.context() as patch:
        count_reads(patch, outcome)
        try:
            made = make_plan(loaded, target=CLUSTER, on_cluster=connect if has_cluster else None)
            outcome.made, outcome.report, outcome.prepared = made
        except AnnealError as error:
            outcome.error = str(error)
    return outcome


@pytest.mark.slow
def test_nodes_prepare_the_rows_and_store_them(settings: dict[str, Any], tmp_path: Path):
    outcome = plan(tmp_path, settings)
    calls, made = outcome.calls, outcome.made
    assert outcome.error == ""
    assert set(calls) == {"connect", "find_schema", "prepare", "join", "disconnect"}
    assert calls.count("connect") == calls.count("disconnect") == 2, "one Ray job for each set of rows"
    assert calls[-1] == "disconnect", "the rest of the plan needs no cluster"
    on_worker = fetch_prepared(made.train, tmp_path / "worker", made.prepared)
    valid = fetch_prepared(made.valid, tmp_path / "worker", made.prepared)
    assert calls.count("prepare") == sum(len(data_files(rows.directory)) for rows in (on_worker, valid)) > 4
    assert len(on_worker.dataset()) == on_worker.summary.rows == 40
    assert not list((tmp_path / "scratch").glob("**/data*.arrow")), "the driver has no tokens"
    indexes = list((tmp_path / "scratch").glob(f"**/{INDEX_FILE}"))
    assert len(indexes) == 2, "a task would take longer than the download of few rows"
    assert plan(tmp_path, settings).calls == [], "prepared once"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
def test_driver_receives_no_more_for_more_rows(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
):
    monkeypatch.setattr(index_figures, "MOST_ROWS_HERE", 100)

    def received(rows: int) -> list[tuple[list[str], int]]:
        """Return the calls and the received bytes of a first plan, and of a second one after the rows have been prepared."""
        directory = tmp_path / str(rows)
        directory.mkdir()
        train, valid = write_data(directory, train_rows=rows, valid_rows=rows // 2)
        monkeypatch.setattr(shards, "SHARD_BYTES", train.stat().st_size // 4 + 1)
        uri = f"{settings['storage_path']}/{rows}"
        open_store(uri).upload_many({path.name: path for path in (train, valid)})
        changes = {"train_path": f"{uri}/train.jsonl", "valid_path": f"{uri}/valid.jsonl"}
        changes |= {"storage_path": f"{uri}/runs", "packing": packing, "context_length": 256}
        outcomes = [
            plan(directory, settings | changes | {"output_dir": str(directory / f"driver {attempt}")})
            for attempt in range(2)
        ]
        assert [outcome.error for outcome in outcomes] == ["", ""]
        assert outcomes[0].report.train.rows == rows
        assert not list(directory.glob("driver */**/*.arrow")), "the driver has neither tokens nor an index"
        return [(outcome.calls, outcome.received) for outcome in outcomes]

    (calls, few), (calls_again, few_again) = received(200)
    (more_calls, many), (more_calls_again, many_again) = received(2000)
    assert calls == more_calls
    assert calls[-3:] == calls_again == more_calls_again == ["connect", "measure_stored", "disconnect"]
    assert 1000 < few_again < few < 30_000
    assert many < 1.1 * few
    assert many_again < 1.1 * few_again


def stored(made: RunPlan) -> dict[str, bytes]:
    store = open_store(made.prepared)
    return {item.key: store.read(item.key) for item in store.list()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding": "max_length", "context_length": 100},
        {"packing": True, "context_length": 256, "valid_path": None, "valid_split": 0.2},
    ],
    ids=["rows", "padded rows", "packs"],
)
def test_cluster_makes_the_plan_and_the_files_of_one_machine(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    """Each task runs twice, as Ray runs it if its node is lost."""
    monkeypatch.setattr(index_figures, "MOST_ROWS_HERE", 0)
    train, valid, uri = settings["train_path"], settings["valid_path"], settings["storage_path"]
    settings |= {
        "train_path": [{"path": train, "weight": 1}, {"path": valid, "weight": 2}],
        "valid_path": {"new": valid, "known": train},
        "train_batch_size_per_device": 4,
        "max_steps": None,
        "num_epochs": 3,
        **changes,
    }
    on_cluster = plan(tmp_path / "cluster", settings, times=2)
    elsewhere = {"storage_path": f"{uri}-here", "output_dir": str(tmp_path / "here")}
    here = plan(tmp_path / "here", settings | elsewhere, has_cluster=False)
    assert (on_cluster.error, here.error) == ("", "")
    assert on_cluster.calls[-2:] == ["measure_stored", "disconnect"]
    assert here.calls == []

    fields = set(DataReport.model_fields)
    assert on_cluster.report.model_dump(include=fields) == here.report.model_dump(include=fields)
    assert here.report.in_both > 0 or "valid_split" in changes
    assert on_cluster.made.max_steps == here.made.max_steps == 3 * here.made.steps_per_epoch
    files = {
        f"{rows.key}/{path.name}": path.read_bytes()
        for rows in here.prepared
        for path in rows.directory.iterdir()
    }
    assert stored(on_cluster.made) == files
    assert any(name.endswith(INDEX_FILE) for name in files)


@pytest.mark.slow
def test_leftovers_of_a_killed_driver_are_replaced(settings: dict[str, Any], tmp_path: Path):
    """Another version may have cut more shards, whose tokens must not become rows."""
    made = plan(tmp_path, settings).made
    store = open_store(f"{made.prepared}/{made.train}")
    expected = {item.key: store.read(item.key) for item in store.list()}
    store.delete(["summary.json"])
    for name in ("data-00001.arrow", "data-99999.arrow", "parts/index-99999.arrow"):
        store.write(name, expected["data-00000.arrow"])
    shutil.rmtree(tmp_path / "scratch")
    assert "prepare" in plan(tmp_path, settings).calls
    assert {item.key: store.read(item.key) for item in store.list()} == expected


def test_node_that_cannot_write_is_named_and_its_shards_are_removed(settings: dict[str, Any], tmp_path: Path):
    outcome = plan(tmp_path, settings, lost_disk=str(tmp_path / "lost"))
    assert outcome.calls.count("prepare") == 3
    assert_names(
        outcome.error, settings["train_path"], socket.gethostname(), str(tmp_path / "lost"), "output_dir"
    )
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
    outcome = plan(tmp_path, settings | {key: value})
    assert named in outcome.error
    assert outcome.calls == []


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
    outcome = plan(tmp_path, settings | {"valid_path": None, key: here[key]})
    assert outcome.error == ""
    assert outcome.calls == []
    assert list((tmp_path / "scratch" / "cache" / "prepared" / outcome.made.train).glob("data-*.arrow"))


def test_local_run_has_no_cluster_to_prepare_rows(settings: dict[str, Any], tmp_path: Path):
    config = load_config(write_yaml(tmp_path / "run.yaml", settings)).config
    with rows_on_cluster(config, ClusterTarget(None)) as run:
        assert run is None
