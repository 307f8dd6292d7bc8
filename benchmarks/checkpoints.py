"""Measure how long a checkpoint stalls training, compared with a synchronous upload: `make bench-checkpoints`.

Each round commits the same 256 MB twice to the embedded bucket, through a proxy with a 30 ms round trip and 90 MB/s per
connection: once synchronously, once while steps continue. The stall is the time until training can continue with its
next step. Steps during the upload are slower, because the upload uses CPU time. Here the server and the proxy use the
same CPU, unlike in production. Steps run on one thread. Writing the files to the node's disk is not measured. Finally,
200 small checkpoints are committed in a row, and the process's resources after the 20th and the last are compared.
"""

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from runs import reading
from runs.layout import Speed
from tests.support.bucket_proxy import bucket_proxy
from tests.support.own_buckets import aws_variables
from tests.support.stored_runs import make_manifest
from training.checkpoints.committer import CheckpointCommitter, CommitContext, SavedCheckpoint
from training.checkpoints.lease import held_lease
from training.events import CheckpointCommitted
from training.world import World
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket

MB = 1024 * 1024
FILES, FILE_BYTES, SMALL_FILE_BYTES = 4, 64 * MB, 64 * 1024
LATENCY_SECONDS, BYTES_PER_SECOND = 0.03, 90e6
UNDISTURBED_STEPS = 30
SETTLED, IN_A_ROW = 20, 200
BUCKET = "bench"
ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0)


def main() -> None:
    rounds = rounds_parser(__doc__, 7).parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as temporary:  # the server may still be shutting down
        directory = Path(temporary)
        os.environ[STATE_VARIABLE] = str(directory / "bucket")
        with embedded_bucket() as server:
            os.environ |= aws_variables(server)
            create_bucket()
            with bucket_proxy(
                server.endpoint, latency_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND
            ) as proxy:
                os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
                measured = [measure_stalls(directory, number) for number in range(rounds)]
            os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint
            counts = measure_growth(directory)
    summary = {
        f"{figure}_to_synchronous_upload": spread(
            [round_[f"{figure}_seconds"] / round_["synchronous_seconds"] for round_ in measured]
        )
        for figure in ("stall", "slower_steps")
    }
    write_report("checkpoints", summary, measured, counts)


def create_bucket() -> None:
    from boto3.session import Session

    Session().client("s3").create_bucket(Bucket=BUCKET)


def measure_stalls(directory: Path, number: int) -> dict[str, Any]:
    """Return the seconds that a synchronous and an asynchronous checkpoint take."""
    store = open_store(f"s3://{BUCKET}/stalls-{number}")
    train = make_step()
    undisturbed = statistics.median(timed(train) for _ in range(UNDISTURBED_STEPS))
    committed = threading.Event()
    with open_committer(store, committed) as committer:
        first, second = (write_checkpoint(directory, step, FILE_BYTES) for step in (1, 2))
        synchronous = timed(lambda: (committer.start(first), committer.wait()))
        committed.clear()
        stall = timed(lambda: committer.start(second))
        start, steps = time.perf_counter(), 0
        while not committed.is_set():
            train()
            steps += 1
        slowdown = time.perf_counter() - start - steps * undisturbed
    return {
        "synchronous_seconds": synchronous,
        "stall_seconds": stall,
        "slower_steps_seconds": slowdown,
        "steps_meanwhile": steps,
        "undisturbed_step_seconds": undisturbed,
    }


def measure_growth(directory: Path) -> dict[str, float]:
    """Return the growth of the process's resources between an early checkpoint and the last one."""
    store = open_store(f"s3://{BUCKET}/in-a-row")
    resources: dict[int, dict[str, float]] = {}
    with open_committer(store, threading.Event()) as committer:
        for step in range(1, IN_A_ROW + 1):
            committer.start(write_checkpoint(directory, step, SMALL_FILE_BYTES))
            if step in (SETTLED, IN_A_ROW):
                committer.wait()
                resources[step] = {
                    "MB of memory": psutil.Process().memory_info().rss / MB,
                    "threads": threading.active_count(),
                    "descriptors": psutil.Process().num_fds(),
                    "files on the node": len(list(directory.glob("checkpoint-*"))),
                    "objects in the run": len(store.list()),
                }
    return {
        f"{resource} more after {IN_A_ROW} checkpoints than after {SETTLED}": resources[IN_A_ROW][resource]
        - resources[SETTLED][resource]
        for resource in resources[SETTLED]
    }


@contextmanager
def open_committer(store: Store, committed: threading.Event) -> Iterator[CheckpointCommitter]:
    def on_commit(_: CheckpointCommitted) -> None:
        committed.set()

    def waiting(owner: str) -> None:
        raise AssertionError(f"{owner} holds a run of this benchmark")

    def describe(directory: Path, state: object) -> SavedCheckpoint:
        raise AssertionError(f"{directory}: this benchmark describes its checkpoints itself")

    with held_lease(store, waiting=waiting) as lease:
        context = CommitContext(store, lease, ALONE, keep=1, describe=describe, report=on_commit)
        with CheckpointCommitter(context, reading.committed(store)) as committer:
            yield committer


def write_checkpoint(directory: Path, step: int, size: int) -> SavedCheckpoint:
    """Write a checkpoint to the node's disk."""
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir()
    for number in range(FILES):
        (checkpoint / f"file-{number}.safetensors").write_bytes(os.urandom(size))
    return SavedCheckpoint(checkpoint, make_manifest(step), "", CheckpointCommitted(step, "", 0, 0, Speed()))


def make_step() -> Any:
    """Return a forward and backward pass of about 50 ms on one core."""
    layer = torch.nn.Linear(1024, 1024)
    batch = torch.randn(512, 1024)

    def step() -> None:
        hidden = batch
        for _ in range(4):
            hidden = layer(hidden)
        hidden.sum().backward()

    return step


def timed(call: Any) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
