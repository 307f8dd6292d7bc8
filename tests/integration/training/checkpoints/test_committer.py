"""Tests of the commit, retention and deletion of checkpoints on a real S3 server that stalls, fails or loses responses."""

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
from tests.support.faults import require_small_disks, small_disk_prefix
from tests.support.own_buckets import set_up_fsspec_bucket, set_up_own_bucket
from tests.support.stored_runs import make_manifest
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
    """Return the URI of a run in a user's bucket, accessed with our S3 client or, if a test requests it, through fsspec."""
    reach = getattr(request, "param", set_up_own_bucket)
    return f"{reach(monkeypatch, bucket, BUCKET)}/{secrets.token_hex(6)}"


with_both_clients = pytest.mark.parametrize(
    "run_uri", [set_up_own_bucket, set_up_fsspec_bucket], ids=["s3", "s3fs"], indirect=True
)


@contextmanager
def behind_proxy(
    bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, *faults: Fault
) -> Iterator[BucketProxy]:
    """Send S3 requests through a proxy with these faults within the block."""
    with bucket_proxy(bucket.endpoint, *faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.endpoint)


def fail_if_waiting(owner: str) -> None:
    raise AssertionError(f"the driver waits for {owner}")


def save_locally(directory: Path, step: int, eval_loss: float | None = None) -> SavedCheckpoint:
    """Write random checkpoint files for a step; return them as a saved checkpoint."""
    checkpoint = directory / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(os.urandom(100_000))
    (checkpoint / "shards" / "optimizer.pt").write_bytes(os.urandom(10_000))
    committed = CheckpointCommitted(step, f"step {step}", 0, 0, Speed())
    return SavedCheckpoint(checkpoint, make_manifest(step, float(step), eval_loss), "{}\n", committed)


def fail_if_described(directory: Path, state: object) -> SavedCheckpoint:
    raise AssertionError(f"{directory}: these tests describe their checkpoints without the context")


def make_committer(
    store: Store,
    lease: Lease,
    *,
    keep: int = 1,
    on_commit: Callable[[CheckpointCommitted], None] = lambda committed: None,
) -> CheckpointCommitter:
    context = CommitContext(store, lease, ALONE, keep, describe=fail_if_described, report=on_commit)
    return CheckpointCommitter(context, reading.committed(store))


@contextmanager
def committer_with_lease(
    store: Store, *, keep: int = 1, on_commit: Callable[[CheckpointCommitted], None] = lambda committed: None
) -> Iterator[CheckpointCommitter]:
    """Hold the lease of a run and commit checkpoints under it within the block."""
    with (
        held_lease(store, waiting=fail_if_waiting) as lease,
        make_committer(store, lease, keep=keep, on_commit=on_commit) as committer,
    ):
        yield committer


def committed_steps(store: Store) -> list[int]:
    return [manifest.step for manifest in reading.committed(store)]


@pytest.mark.slow
def test_save_waits_only_for_the_previous_upload(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    stall = Fault("stall", method="PUT", key="model.safetensors", times=1)
    reported_steps: list[int] = []
    with behind_proxy(bucket, monkeypatch, stall):
        store = open_store(run_uri)
        with committer_with_lease(
            store, keep=2, on_commit=lambda committed: reported_steps.append(committed.step)
        ) as committer:
            committer.start(save_locally(tmp_path, 1))
            assert reported_steps == [] and committed_steps(store) == [], "the upload still hangs"
            committer.check()
            stall.released.set()
            committer.start(save_locally(tmp_path, 2))
            assert reported_steps == [1], "the second save waits for the first commit"
        assert stall.times_injected == 1
    assert reported_steps == [1, 2]
    assert committed_steps(open_store(run_uri)) == [1, 2]
    assert list(tmp_path.iterdir()) == [], "a committed checkpoint is deleted from the node"


def test_checkpoint_overwrites_losses_recorded_before_it(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    log = [{"loss": 1.5, "step": 1, "epoch": 0.5}, {"train_runtime": 2.0, "step": 1}]
    with committer_with_lease(store) as committer:
        committer.record(log)
    assert [(line.step, line.loss) for line in reading.read_metrics(store)] == [(1, 1.5)]
    assert committed_steps(store) == []
    with committer_with_lease(store) as committer:
        committer.record(log)
        committer.start(save_locally(tmp_path, 2))
    assert store.read(METRICS_FILE) == b"{}\n", "the metrics of the checkpoint replace the recorded losses"


def test_failed_record_of_losses_does_not_fail_a_commit(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rejection = Fault("reject", method="PUT", key=METRICS_FILE, status=403, code="AccessDenied", times=1)
    with behind_proxy(bucket, monkeypatch, rejection):
        store = open_store(run_uri)
        with committer_with_lease(store) as committer:
            committer.record([{"loss": 1.5, "step": 1}])
            committer.start(save_locally(tmp_path, 2))
        assert rejection.times_injected == 1
    assert committed_steps(open_store(run_uri)) == [2]


def test_failed_upload_raises_its_error_at_the_next_check(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rejection = Fault("reject", method="PUT", key="optimizer.pt", status=403, code="AccessDenied")
    with behind_proxy(bucket, monkeypatch, rejection):
        store = open_store(run_uri)
        with pytest.raises(BucketError, match=r"optimizer\.pt"), committer_with_lease(store) as committer:
            committer.start(save_locally(tmp_path, 1))
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                committer.check()
                time.sleep(0.05)
            pytest.fail("check() raised no error within 60 s")
    assert committed_steps(open_store(run_uri)) == []


def test_lost_response_to_the_manifest_write_does_not_fail_the_commit(
    run_uri: str, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The retry of the conditional write finds the manifest that the first request stored."""
    lost_response = Fault("lose", method="PUT", key=MANIFEST_FILE, times=1)
    with behind_proxy(bucket, monkeypatch, lost_response):
        store = open_store(run_uri)
        with committer_with_lease(store) as committer:
            committer.start(save_locally(tmp_path, 1))
        assert lost_response.times_injected == 1
    assert committed_steps(open_store(run_uri)) == [1]


@with_both_clients
def test_second_commit_of_a_step_is_an_error(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with committer_with_lease(store) as committer:
        committer.start(save_locally(tmp_path, 1))
    manifest = store.read(checkpoint_key(1, MANIFEST_FILE))
    with pytest.raises(CheckpointError, match="committed by"), committer_with_lease(store) as committer:
        committer.start(save_locally(tmp_path, 1))
    assert store.read(checkpoint_key(1, MANIFEST_FILE)) == manifest


@pytest.mark.slow
def test_every_writer_reports_a_full_disk(tmp_path: Path):
    """Python, safetensors and torch each raise a different error for a full disk; other errors are passed on unchanged."""
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
    lines = subprocess.run(
        [*small_disk_prefix(tmp_path, "2m"), sys.executable, "-c", save, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    reports_full_disk = [
        line.startswith(f"[] {tmp_path}/checkpoint-1: ") and "2.0 MiB" in line for line in lines
    ]
    assert reports_full_disk == [True, True, True, False, False], lines


@with_both_clients
def test_commit_rejects_a_file_whose_size_differs(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    checkpoint = save_locally(tmp_path, 1)
    records = checkpoints.upload_files(store, 1, checkpoint.directory, ["model.safetensors"])
    store.write(checkpoint_key(1, "model.safetensors"), b"another attempt's")
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*\b17 bytes.*\b100000\b"):
        checkpoints.commit(store, checkpoint.manifest.model_copy(update={"files": records}))
    assert committed_steps(store) == []


@with_both_clients
def test_fetch_rejects_weights_that_differ_from_their_manifest(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with committer_with_lease(store) as committer:
        committer.start(save_locally(tmp_path / "saved", 1))
    checkpoint, weights = store.uri_of("checkpoints/step-000001"), checkpoint_key(1, "model.safetensors")

    def fetch(cache: str) -> Path:
        return fetch_weights(checkpoint, tmp_path / cache, lambda key: key == "model.safetensors")

    committed = store.read(weights)
    assert (fetch("first") / "model.safetensors").read_bytes() == committed
    store.write(weights, bytes(len(committed)))
    for cache in ("first", "second"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*content"):
            fetch(cache)


def test_remove_leftovers_deletes_partial_checkpoints_and_uploads(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with committer_with_lease(store) as committer:
        committer.start(save_locally(tmp_path, 1))
    store.write(checkpoint_key(2, "model.safetensors"), b"half a checkpoint")
    store.write(checkpoint_key(3, "model.safetensors"), b"damaged")
    store.write(checkpoint_key(3, MANIFEST_FILE), b"{")
    upload = _start_multipart_upload(run_uri, checkpoint_key(2, "optimizer.pt"))
    assert upload in _multipart_uploads(run_uri)
    deleted = checkpoints.remove_leftovers(store, reading.committed(store))
    assert deleted == [
        checkpoint_key(3, MANIFEST_FILE),
        checkpoint_key(2, "model.safetensors"),
        checkpoint_key(3, "model.safetensors"),
    ]
    assert upload not in _multipart_uploads(run_uri)
    assert committed_steps(store) == [1]
    assert {item.key.split("/")[1] for item in store.list("checkpoints/")} == {"step-000001"}


def test_manifest_of_another_step_is_reported_as_damage(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with committer_with_lease(store, keep=2) as committer:
        for step in (1, 2):
            committer.start(save_locally(tmp_path, step))
    store.write(checkpoint_key(2, MANIFEST_FILE), store.read(checkpoint_key(1, MANIFEST_FILE)))
    manifests, damage = reading.survey(store)
    assert [manifest.step for manifest in manifests] == [1]
    (message,) = damage
    assert message.startswith(f"{store.uri_of(checkpoint_key(2, MANIFEST_FILE))} ")
    assert "step 1" in message


def _start_multipart_upload(run_uri: str, key: str) -> str:
    from boto3.session import Session

    bucket, _, prefix = run_uri.removeprefix("s3://").partition("/")
    client = Session().client("s3")
    upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")["UploadId"]
    client.upload_part(Bucket=bucket, Key=f"{prefix}/{key}", UploadId=upload, PartNumber=1, Body=b"part")
    return upload


def _multipart_uploads(run_uri: str) -> list[str]:
    from boto3.session import Session

    bucket, _, prefix = run_uri.removeprefix("s3://").partition("/")
    listing = Session().client("s3").list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [upload["UploadId"] for upload in listing.get("Uploads", [])]


@with_both_clients
def test_best_latest_and_referenced_checkpoints_are_retained(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    child_uri = f"{run_uri}-child"
    child = open_store(child_uri)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}
    with committer_with_lease(store, keep=1) as committer:
        committer.start(save_locally(tmp_path, 1, losses[1]))
        committer.wait()
        checkpoints.mark_in_use(store.uri_of("checkpoints/step-000001"), child_uri)
        with held_lease(child, waiting=fail_if_waiting):
            for step in (2, 3):
                committer.start(save_locally(tmp_path, step, losses[step]))
            committer.wait()
            assert committed_steps(store) == [1, 2, 3]
        # The child run has neither a lease nor a result, so it counts as deleted.
        committer.start(save_locally(tmp_path, 4, losses[4]))
    assert committed_steps(store) == [2, 4]
    assert store.list("used-by/") == []


@pytest.mark.parametrize("mark", ["{", CheckpointUse(run_uri="s3://no-such-bucket/x").model_dump_json()])
def test_checkpoint_is_retained_for_a_run_that_cannot_be_read(run_uri: str, tmp_path: Path, mark: str):
    store = open_store(run_uri)
    with committer_with_lease(store, keep=1) as committer:
        committer.start(save_locally(tmp_path, 1, 3.0))
        committer.wait()
        store.write(use_key("step-000001", "another"), mark.encode())
        for step in (2, 3):
            committer.start(save_locally(tmp_path, step, 1.0 / step))
    assert committed_steps(store) == [1, 3]


def test_restore_deletes_nothing_if_every_checkpoint_is_damaged(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with committer_with_lease(store, keep=2) as committer:
        for step in (1, 2):
            committer.start(save_locally(tmp_path, step))
    for step in (1, 2):
        store.write(checkpoint_key(step, "model.safetensors"), bytes(100_000))
    before = store.list()
    events: list[Event] = []
    with (
        held_lease(store, waiting=fail_if_waiting) as lease,
        pytest.raises(CheckpointError, match=r"step-000001/model\.safetensors: .*content"),
    ):
        Restoring(store, lease, None, tmp_path / "restored", ALONE).finish(events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert notice.text.endswith(" " + store.uri_of("checkpoints/step-000001") + ".")
    assert store.uri_of("checkpoints/step-000002") in notice.text
    assert store.list() == before


@with_both_clients
def test_driver_whose_lease_was_taken_over_commits_nothing(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    with held_lease(store, waiting=fail_if_waiting) as lease:
        former = Lease.model_validate(lease.model_dump() | {"number": lease.number - 1, "token": "former"})
        with make_committer(store, former) as committer:
            committer.record([{"loss": 1.5, "step": 1}])
        assert store.read_if_exists(METRICS_FILE) is None
        store.write(checkpoint_key(1, "model.safetensors"), b"partial upload of the new owner")
        with pytest.raises(LeaseError, match="taken over"):
            Restoring(store, former, None, tmp_path / "restored", ALONE).finish(lambda event: None)
        assert [item.key for item in store.list("checkpoints/")] == [checkpoint_key(1, "model.safetensors")]
        with (
            pytest.raises(LeaseError, match="taken over"),
            make_committer(store, former) as committer,
        ):
            committer.start(save_locally(tmp_path, 1))
    assert committed_steps(store) == []


@pytest.mark.slow
def test_commits_leak_no_threads_descriptors_objects_or_files(run_uri: str, tmp_path: Path):
    store = open_store(run_uri)
    process = psutil.Process()
    warm_up, later = 10, 30

    def resources() -> tuple[int, int, int]:
        return threading.active_count(), process.num_fds(), len(store.list("checkpoints/"))

    with committer_with_lease(store, keep=1) as committer:
        for step in range(1, warm_up + 1):
            committer.start(save_locally(tmp_path, step))
        committer.wait()
        threads, descriptors, objects = resources()
        for step in range(warm_up + 1, warm_up + later + 1):
            committer.start(save_locally(tmp_path, step))
        committer.wait()
        later_threads, later_descriptors, later_objects = resources()
    # Pool threads open and close connections, so the counts vary. A leak per checkpoint would add `later` of them.
    assert later_threads - threads < later // 2
    assert later_descriptors - descriptors < later // 2
    assert later_objects == objects
    assert list(tmp_path.iterdir()) == []


def test_manifest_deleted_after_the_listing_is_skipped(
    run_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A training driver may delete older checkpoints at any time."""
    store = open_store(run_uri)
    with committer_with_lease(store, keep=2) as committer:
        for step in (1, 2):
            committer.start(save_locally(tmp_path, step))
    listed = store.list("checkpoints/")
    store.delete([checkpoint_key(1, MANIFEST_FILE)])
    monkeypatch.setattr(store, "list", lambda prefix: listed)
    assert [manifest.step for manifest in reading.committed(store)] == [2]
