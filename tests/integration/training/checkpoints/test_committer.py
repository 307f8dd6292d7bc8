"""How checkpoints come to exist and go: in the background, once, on a real S3 server that is slow or forgets to answer."""

import os
import secrets
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runs import reading
from runs.layout import MANIFEST_FILE, METRICS_FILE, CheckpointUse, Lease, Speed, checkpoint_key, use_key
from tests.support.bucket_proxy import BucketProxy, Fault, bucket_proxy
from tests.support.faults import on_a_small_disk, require_small_disks
from tests.support.own_buckets import reach_as_a_user, reach_through_fsspec
from tests.support.stored_runs import manifest_of
from training.checkpoints import store as checkpoints
from training.checkpoints.committer import CheckpointCommitter, CommitContext, SavedCheckpoint
from training.checkpoints.lease import LeaseError, held_lease
from training.checkpoints.restore import Restoring
from training.checkpoints.store import CheckpointError
from training.checkpoints.weights import fetch_weights
from training.events import CheckpointCommitted, Event, Notice
from training.world import World
from utils.storage.bucket import BucketError, Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0)
BUCKET = "commits"


@pytest.fixture
def run_uri(request: pytest.FixtureRequest, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run in a bucket that is reached as a user's is, by us or, where a test asks for it, through fsspec."""
    reach = getattr(request, "param", reach_as_a_user)
    return f"{reach(monkeypatch, bucket, BUCKET)}/{secrets.token_hex(6)}"


by_both_ways = pytest.mark.parametrize(
    "run_uri", [reach_as_a_user, reach_through_fsspec], ids=["s3", "s3fs"], indirect=True
)


@contextmanager
def behind(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, *faults: Fault) -> Iterator[BucketProxy]:
    with bucket_proxy(bucket.endpoint, *faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.endpoint)


def nobody(owner: str) -> None:
    raise AssertionError(f"waits for {owner}")


def saved(directory: Path, step: int, eval_loss: float | None = None) -> SavedCheckpoint:
    place = directory / f"checkpoint-{step}"
    (place / "shards").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(os.urandom(100_000))
    (place / "shards" / "optimizer.pt").write_bytes(os.urandom(10_000))
    told = CheckpointCommitted(step, f"step {step}", 0, 0, Speed())
    return SavedCheckpoint(place, manifest_of(step, float(step), eval_loss), "{}\n", told)


def undescribed(directory: Path, state: object) -> SavedCheckpoint:
    raise AssertionError(f"{directory}: these tests describe their checkpoints themselves")


def committer_of(
    store: Store,
    lease: Lease,
    *,
    keep: int = 1,
    on_commit: Callable[[CheckpointCommitted], None] = lambda committed: None,
) -> CheckpointCommitter:
    context = CommitContext(store, lease, ALONE, keep, describe=undescribed, report=on_commit)
    return CheckpointCommitter(context, reading.committed(store))


@contextmanager
def commits_of(
    store: Store, *, keep: int = 1, on_commit: Callable[[CheckpointCommitted], None] = lambda committed: None
) -> Iterator[CheckpointCommitter]:
    with (
        held_lease(store, waiting=nobody) as lease,
        committer_of(store, lease, keep=keep, on_commit=on_commit) as commits,
    ):
        yield commits


def steps(store: Store) -> list[int]:
    return [manifest.step for manifest in reading.committed(store)]


def test_training_continues_during_an_upload_and_waits_only_for_the_previous_one(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """An upload that hangs for a while: saving returns, the next save waits for it, both are committed at the end."""
    stalled = Fault("stall", method="PUT", key="model.safetensors", times=1, seconds=3)
    told: list[int] = []
    with behind(bucket, monkeypatch, stalled):
        store = open_store(run_uri)
        with commits_of(store, keep=2, on_commit=lambda committed: told.append(committed.step)) as commits:
            commits.start(saved(tmp_path, 1))
            assert told == [] and steps(store) == [], "it is still on its way, and nobody sees it"
            commits.check()
            commits.start(saved(tmp_path, 2))
            assert told == [1], "the second waits for the first"
        assert stalled.struck == 1
    assert told == [1, 2]
    assert steps(open_store(run_uri)) == [1, 2]
    assert list(tmp_path.iterdir()) == [], "nothing is left on the node"


def test_losses_are_recorded_ahead_of_a_checkpoint_which_has_the_last_word(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    log = [{"loss": 1.5, "step": 1, "epoch": 0.5}, {"train_runtime": 2.0, "step": 1}]
    with commits_of(store) as commits:
        commits.record(log)
    assert [(line.step, line.loss) for line in reading.read_metrics(store)] == [(1, 1.5)]
    assert steps(store) == []
    with commits_of(store) as commits:
        commits.record(log)
        commits.start(saved(tmp_path, 2))
    assert store.read(METRICS_FILE) == b"{}\n", "as the checkpoint was saved with"


def test_losses_that_cannot_be_recorded_cost_nothing(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    refused = Fault("refuse", method="PUT", key=METRICS_FILE, status=403, code="AccessDenied", times=1)
    with behind(bucket, monkeypatch, refused):
        store = open_store(run_uri)
        with commits_of(store) as commits:
            commits.record([{"loss": 1.5, "step": 1}])
            commits.start(saved(tmp_path, 2))
        assert refused.struck == 1
    assert steps(open_store(run_uri)) == [2]


def test_an_upload_that_fails_ends_the_run_at_its_next_step(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    refused = Fault("refuse", method="PUT", key="optimizer.pt", status=403, code="AccessDenied")
    with behind(bucket, monkeypatch, refused):
        store = open_store(run_uri)
        with pytest.raises(BucketError, match=r"optimizer\.pt"), commits_of(store) as commits:
            commits.start(saved(tmp_path, 1))
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                commits.check()
                time.sleep(0.05)
            pytest.fail("the failure never came out")
    assert steps(open_store(run_uri)) == []


def test_an_answer_that_is_lost_does_not_cost_the_checkpoint(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The manifest is written, its answer never comes, and sent again it is in its own way."""
    lost = Fault("lose", method="PUT", key=MANIFEST_FILE, times=1)
    with behind(bucket, monkeypatch, lost):
        store = open_store(run_uri)
        with commits_of(store) as commits:
            commits.start(saved(tmp_path, 1))
        assert lost.struck == 1
    assert steps(open_store(run_uri)) == [1]


@by_both_ways
def test_a_step_is_committed_once(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with commits_of(store) as commits:
        commits.start(saved(tmp_path, 1))
    first = store.read(checkpoint_key(1, MANIFEST_FILE))
    with pytest.raises(CheckpointError, match="committed by"), commits_of(store) as commits:
        commits.start(saved(tmp_path, 1))
    assert store.read(checkpoint_key(1, MANIFEST_FILE)) == first


def test_a_full_disk_is_reported_by_every_writer(tmp_path: Path):
    """Python, safetensors and torch each fail in their own words; other failures keep theirs."""
    require_small_disks(tmp_path)
    save = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from training.checkpoints.store import CheckpointError, staging
        directory, zeros = Path(sys.argv[1]) / "checkpoint-1", {"zeros": torch.zeros(1_000_000)}
        directory.mkdir()
        for write in (
            lambda path: path.write_bytes(bytes(4_000_000)),
            lambda path: save_file(zeros, path),
            lambda path: torch.save(zeros, path),
            lambda path: save_file(zeros, path / "missing"),
            lambda path: torch.save(zeros, path / "missing"),
        ):
            try:
                with staging(directory):
                    write(directory / "file")
            except Exception as error:
                print([path.name for path in directory.iterdir()], error)
        """
    )
    said = subprocess.run(
        [*on_a_small_disk(tmp_path, "2m"), sys.executable, "-c", save, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    full = [line.startswith(f"[] {tmp_path}/checkpoint-1: ") and "2.0 MiB" in line for line in said]
    assert full == [True, True, True, False, False], said


@by_both_ways
def test_files_that_are_not_there_are_not_committed(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    checkpoint = saved(tmp_path, 1)
    records = checkpoints.upload_files(store, 1, checkpoint.directory, ["model.safetensors"])
    store.write(checkpoint_key(1, "model.safetensors"), b"another attempt's")
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*\b17 bytes.*\b100000\b"):
        checkpoints.commit(store, checkpoint.manifest.model_copy(update={"files": records}))
    assert steps(store) == []


@by_both_ways
def test_weights_are_compared_with_their_manifest_as_they_come(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with commits_of(store) as commits:
        commits.start(saved(tmp_path / "saved", 1))
    checkpoint, weights = store.uri_of("checkpoints/step-000001"), checkpoint_key(1, "model.safetensors")

    def fetch(cache: str) -> Path:
        return fetch_weights(checkpoint, tmp_path / cache, lambda key: key == "model.safetensors")

    committed = store.read(weights)
    assert (fetch("first") / "model.safetensors").read_bytes() == committed
    store.write(weights, bytes(len(committed)))
    for cache in ("first", "second"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*content"):
            fetch(cache)


def test_partial_files_of_killed_attempts_are_removed_by_the_next_owner(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with commits_of(store) as commits:
        commits.start(saved(tmp_path, 1))
    store.write(checkpoint_key(2, "model.safetensors"), b"half a checkpoint")
    store.write(checkpoint_key(3, "model.safetensors"), b"damaged")
    store.write(checkpoint_key(3, MANIFEST_FILE), b"{")
    upload = _unfinished_upload(run_uri, checkpoint_key(2, "optimizer.pt"))
    assert upload in _uploads(run_uri)
    removed = checkpoints.remove_leftovers(store, reading.committed(store))
    assert removed == [
        checkpoint_key(3, MANIFEST_FILE),
        checkpoint_key(2, "model.safetensors"),
        checkpoint_key(3, "model.safetensors"),
    ]
    assert upload not in _uploads(run_uri)
    assert steps(store) == [1]
    assert {item.key.split("/")[1] for item in store.list("checkpoints/")} == {"step-000001"}


def test_a_manifest_of_another_step_counts_for_none(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with commits_of(store, keep=2) as commits:
        for step in (1, 2):
            commits.start(saved(tmp_path, step))
    store.write(checkpoint_key(2, MANIFEST_FILE), store.read(checkpoint_key(1, MANIFEST_FILE)))
    manifests, damage = reading.survey(store)
    assert [manifest.step for manifest in manifests] == [1]
    (found,) = damage
    assert found.startswith(f"{store.uri_of(checkpoint_key(2, MANIFEST_FILE))} ")
    assert "step 1" in found


def _unfinished_upload(run_uri: str, key: str) -> str:
    from boto3.session import Session

    bucket, _, prefix = run_uri.removeprefix("s3://").partition("/")
    client = Session().client("s3")
    upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")["UploadId"]
    client.upload_part(Bucket=bucket, Key=f"{prefix}/{key}", UploadId=upload, PartNumber=1, Body=b"part")
    return upload


def _uploads(run_uri: str) -> list[str]:
    from boto3.session import Session

    bucket, _, prefix = run_uri.removeprefix("s3://").partition("/")
    listing = Session().client("s3").list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [upload["UploadId"] for upload in listing.get("Uploads", [])]


@by_both_ways
def test_the_best_the_latest_and_referenced_checkpoints_are_retained(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    child_uri = f"{run_uri}-child"
    child = open_store(child_uri)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}
    with commits_of(store, keep=1) as commits:
        commits.start(saved(tmp_path, 1, losses[1]))
        commits.wait()
        checkpoints.mark_in_use(store.uri_of("checkpoints/step-000001"), child_uri)
        with held_lease(child, waiting=nobody):
            for step in (2, 3):
                commits.start(saved(tmp_path, step, losses[step]))
            commits.wait()
            assert steps(store) == [1, 2, 3]
        # The child's lease has gone without a result: somebody removed that run.
        commits.start(saved(tmp_path, 4, losses[4]))
    assert steps(store) == [2, 4]
    assert store.list("used-by/") == []


@pytest.mark.parametrize("mark", ["{", CheckpointUse(run_uri="s3://no-such-bucket/x").model_dump_json()])
def test_a_checkpoint_is_kept_for_a_run_that_cannot_be_looked_at(run_uri: str, tmp_path: Path, mark: str):
    store = open_store(run_uri)
    with commits_of(store, keep=1) as commits:
        commits.start(saved(tmp_path, 1, 3.0))
        commits.wait()
        store.write(use_key("step-000001", "another"), mark.encode())
        for step in (2, 3):
            commits.start(saved(tmp_path, step, 1.0 / step))
    assert steps(store) == [1, 3]


def test_where_every_checkpoint_is_damaged_none_is_removed(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with commits_of(store, keep=2) as commits:
        for step in (1, 2):
            commits.start(saved(tmp_path, step))
    for step in (1, 2):
        store.write(checkpoint_key(step, "model.safetensors"), bytes(100_000))
    before = store.list()
    told: list[Event] = []
    with (
        held_lease(store, waiting=nobody) as lease,
        pytest.raises(CheckpointError, match=r"step-000001/model\.safetensors: .*content"),
    ):
        Restoring(store, lease, None, tmp_path / "restored", ALONE).finish(told.append)
    (notice,) = told
    assert isinstance(notice, Notice)
    assert notice.text.endswith(" " + store.uri_of("checkpoints/step-000001") + ".")
    assert store.uri_of("checkpoints/step-000002") in notice.text
    assert store.list() == before


@by_both_ways
def test_a_driver_whose_claim_was_taken_over_commits_nothing(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with held_lease(store, waiting=nobody) as lease:
        former = Lease.model_validate(lease.model_dump() | {"number": lease.number - 1, "token": "former"})
        with committer_of(store, former) as commits:
            commits.record([{"loss": 1.5, "step": 1}])
        assert store.read_if_exists(METRICS_FILE) is None
        store.write(checkpoint_key(1, "model.safetensors"), b"the new owner's, on its way")
        with pytest.raises(LeaseError, match="taken over"):
            Restoring(store, former, None, tmp_path / "restored", ALONE).finish(lambda event: None)
        assert [item.key for item in store.list("checkpoints/")] == [checkpoint_key(1, "model.safetensors")]
        with (
            pytest.raises(LeaseError, match="taken over"),
            committer_of(store, former) as commits,
        ):
            commits.start(saved(tmp_path, 1))
    assert steps(store) == []


def test_many_checkpoints_leave_nothing_behind(run_uri: str, tmp_path: Path):
    """Neither threads nor descriptors, nor files on the node, nor objects in the bucket."""
    store = open_store(run_uri)
    process = psutil.Process()
    first, more = 10, 30

    def held() -> tuple[int, int, int]:
        return threading.active_count(), process.num_fds(), len(store.list("checkpoints/"))

    with commits_of(store, keep=1) as commits:
        for step in range(1, first + 1):
            commits.start(saved(tmp_path, step))
        commits.wait()
        threads, descriptors, objects = held()
        for step in range(first + 1, first + more + 1):
            commits.start(saved(tmp_path, step))
        commits.wait()
        later_threads, later_descriptors, later_objects = held()
    # Connections come and go with the pool's threads: what each checkpoint left would make it `more` of them.
    assert later_threads - threads < more // 2
    assert later_descriptors - descriptors < more // 2
    assert later_objects == objects
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_goes_while_the_run_is_looked_at_is_passed_over(
    run_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Who trains removes older checkpoints at any time."""
    store = open_store(run_uri)
    with commits_of(store, keep=2) as commits:
        for step in (1, 2):
            commits.start(saved(tmp_path, step))
    listed = store.list("checkpoints/")
    store.delete([checkpoint_key(1, MANIFEST_FILE)])
    monkeypatch.setattr(store, "list", lambda prefix: listed)
    assert [manifest.step for manifest in reading.committed(store)] == [2]
