"""Compare file transfers to and from a bucket with other clients: `make bench-bucket` prints the table.

All transfers use the embedded bucket, with or without a proxy that simulates a network ("shaped"): 30 ms round trip and
90 MB/s per connection. In each round, every contestant transfers the same bytes in its own process, one after the other,
in rotating order; ratios are taken within a round. Counts (bytes that reach a node, faults) are deterministic and are
measured once.
"""

import json
import logging
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from runs.layout import MANIFEST_FILE, checkpoint_key, checkpoint_uri
from tests.support.bucket_proxy import Fault, bucket_proxy
from tests.support.own_buckets import aws_variables
from tests.support.stored_runs import make_manifest
from training.checkpoints import store as checkpoints
from training.checkpoints.store import CheckpointError
from utils.storage.bucket import BucketError, open_store
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket
from utils.storage.s3 import BLOCK_BYTES

MB = 1024 * 1024
LARGE_BYTES, SMALL_BYTES, SMALL_FILES = 512 * MB, 64 * 1024, 64
LATENCY_SECONDS, BYTES_PER_SECOND = 0.03, 90e6
BUCKET = "bench"
TRIES_UNDER_ERRORS, TRIES_WITH_DAMAGE = 20, 1000
SYNC = (
    "import sys; from pathlib import Path; from utils.storage.bucket import sync_to_node\n"
    "sync_to_node(sys.argv[1], Path(sys.argv[2]))"
)


def main() -> None:
    rounds = rounds_parser(__doc__, 7).parse_args().rounds
    # Hide the warnings about damaged downloads.
    logging.getLogger("utils.storage.transfer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory = Path(temporary)
        os.environ[STATE_VARIABLE] = str(directory / "bucket")
        server = stack.enter_context(embedded_bucket())
        os.environ |= aws_variables(server)
        small = fill_bucket(directory)
        shaped = stack.enter_context(
            bucket_proxy(server.endpoint, latency_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND)
        ).endpoint
        races = {
            "large_down_shaped": (
                ("ray", "boto3", "s5cmd", "anneal"),
                lambda name: race_down(name, f"s3://{BUCKET}/large", directory, shaped),
            ),
            "large_down": (
                ("s5cmd", "anneal"),
                lambda name: race_down(name, f"s3://{BUCKET}/large", directory, server.endpoint),
            ),
            "small_down_shaped": (
                ("ray", "anneal"),
                lambda name: race_down(name, f"s3://{BUCKET}/small", directory, shaped),
            ),
            "small_up_shaped": (("ray", "anneal"), lambda name: race_up(name, small, directory, shaped)),
        }
        measured: list[dict[str, Any]] = []
        for number in range(rounds):
            measured.append({race: run_round(number, *contest) for race, contest in races.items()})
            print(json.dumps(measured[-1]), flush=True)
        counts = {
            **count_downloaded_bytes(server.endpoint, directory),
            **count_successes_under_errors(server.endpoint, directory),
            **count_wrongly_accepted(server.endpoint, directory),
        }
    write_report("bucket", summarize(measured), measured, counts)


def fill_bucket(directory: Path) -> Path:
    """Upload the objects; return the directory of the small files."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    (directory / "large").write_bytes(os.urandom(LARGE_BYTES))
    open_store(f"s3://{BUCKET}/large").upload(directory / "large", "model.safetensors")
    (directory / "large").unlink()
    small = directory / "small"
    small.mkdir()
    for number in range(SMALL_FILES):
        (small / f"{number:02}").write_bytes(os.urandom(SMALL_BYTES))
    open_store(f"s3://{BUCKET}/small").upload_many({path.name: path for path in small.iterdir()})
    return small


# --- Races -------------------------------------------------------------------------------------------------------


def run_round(
    number: int, names: tuple[str, ...], run: Callable[[str], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Run every contestant once, in rotating order."""
    start = number % len(names)
    return {name: run(name) for name in names[start:] + names[:start]}


def race_down(name: str, uri: str, directory: Path, endpoint: str) -> dict[str, float]:
    """Time one download into an empty directory."""
    target = directory / "target"
    target.mkdir()
    try:
        cost = _run_transfer("down", name, uri, target, endpoint)
        cost["bytes"] = sum(path.stat().st_size for path in target.iterdir())
    finally:
        shutil.rmtree(target)
    assert cost["bytes"] == (LARGE_BYTES if uri.endswith("large") else SMALL_FILES * SMALL_BYTES)
    return cost


def race_up(name: str, small: Path, directory: Path, endpoint: str) -> dict[str, float]:
    """Time the upload of the small files to an empty prefix."""
    uri = f"s3://{BUCKET}/up-{secrets.token_hex(4)}"
    cost = _run_transfer("up", name, uri, small, endpoint)
    assert sum(item.size for item in open_store(uri).list()) == SMALL_FILES * SMALL_BYTES
    return cost


def _run_transfer(transfer: str, name: str, uri: str, directory: Path, endpoint: str) -> dict[str, float]:
    command = [sys.executable, str(PROJECT / "benchmarks" / "bucket_peers.py"), transfer, name, uri]
    environment = os.environ | {"AWS_ENDPOINT_URL_S3": endpoint}
    completed = subprocess.run(
        [*command, str(directory)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(completed.stdout)


def summarize(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the peers' seconds divided by Anneal's (higher is better), and Anneal's CPU time and memory."""

    def ratio(contest: str, peer: str, figure: str = "seconds") -> dict[str, float]:
        return spread([r[contest][peer][figure] / r[contest]["anneal"][figure] for r in rounds])

    checksum_seconds = _checksum_seconds()
    downloads = [r["large_down"]["anneal"] for r in rounds]
    return {
        "large_down_shaped: seconds of ray / anneal": ratio("large_down_shaped", "ray"),
        "large_down_shaped: seconds of boto3 / anneal": ratio("large_down_shaped", "boto3"),
        "large_down_shaped: seconds of s5cmd / anneal": ratio("large_down_shaped", "s5cmd"),
        "large_down_shaped: CPU of s5cmd / anneal": ratio("large_down_shaped", "s5cmd", "cpu_seconds"),
        "large_down: seconds of s5cmd / anneal": ratio("large_down", "s5cmd"),
        "large_down: CPU of s5cmd / anneal": ratio("large_down", "s5cmd", "cpu_seconds"),
        "small_up_shaped: seconds of ray / anneal": ratio("small_up_shaped", "ray"),
        "small_down_shaped: seconds of ray / anneal": ratio("small_down_shaped", "ray"),
        "large_down: CPU seconds per GB of anneal": spread(
            [cost["cpu_seconds"] / (LARGE_BYTES / 1e9) for cost in downloads]
        ),
        "large_down: memory of anneal, MB": spread([cost["memory_mb"] for cost in downloads]),
        "large_down: share of verification in CPU": spread(
            [checksum_seconds / cost["cpu_seconds"] for cost in downloads]
        ),
    }


def _checksum_seconds() -> float:
    """Return the CPU seconds for the checksum of the large object, in blocks of the download's size."""
    from awscrt.checksums import crc64nvme

    block, value = os.urandom(BLOCK_BYTES), 0
    start = time.process_time()
    for _ in range(LARGE_BYTES // BLOCK_BYTES):
        value = crc64nvme(block, value)
    return time.process_time() - start


# --- Counts ------------------------------------------------------------------------------------------------------


def count_downloaded_bytes(endpoint: str, directory: Path) -> dict[str, float]:
    """Count downloaded bytes, relative to the model size, for 2, 4 and 8 concurrent syncs and for repeated ones."""
    counts = {}
    for workers in (2, 4, 8):
        cache = directory / f"cache-{workers}"
        with bucket_proxy(endpoint) as proxy:
            for label in (f"{workers} workers: bytes / size", f"{workers} workers again: bytes / size"):
                proxy.requests.clear()
                command = [sys.executable, "-c", SYNC, f"s3://{BUCKET}/large", str(cache)]
                environment = os.environ | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}
                processes = [subprocess.Popen(command, env=environment, cwd=PROJECT) for _ in range(workers)]
                assert [process.wait() for process in processes] == [0] * workers
                counts[label] = proxy.body_bytes(BUCKET) / LARGE_BYTES
        shutil.rmtree(cache)
    return counts


def count_successes_under_errors(endpoint: str, directory: Path) -> dict[str, int]:
    """Count the successful downloads while the server rejects half of all requests."""
    from boto3.session import Session

    succeeded = {"anneal": 0, "boto3": 0}
    store = open_store(f"s3://{BUCKET}/rejected")
    store.write("file", os.urandom(64 * MB))
    faults = [Fault("reject", method, share=0.5) for method in ("GET", "HEAD")]
    with bucket_proxy(endpoint, *faults) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        for _ in range(TRIES_UNDER_ERRORS):
            with suppress(BucketError):
                open_store(f"s3://{BUCKET}/rejected").download("file", directory / "rejected")
                succeeded["anneal"] += 1
            client = Session().client("s3")
            with suppress(client.exceptions.ClientError):
                client.download_file(BUCKET, "rejected/file", str(directory / "rejected"))
                succeeded["boto3"] += 1
    os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
    return {f"{name}: of {TRIES_UNDER_ERRORS} under 503s": count for name, count in succeeded.items()}


def count_wrongly_accepted(endpoint: str, directory: Path) -> dict[str, int]:
    """Count the restores of a damaged checkpoint that are wrongly accepted.

    The damage alternates: a flipped bit in the weights, another object in place of the weights, a truncated manifest, and
    the manifest of an earlier attempt.
    """
    run, weights, restored = open_store(f"s3://{BUCKET}/run"), directory / "weights", directory / "restored"
    manifests = []
    for _ in range(2):
        weights.write_bytes(os.urandom(SMALL_BYTES))
        files = checkpoints.upload_files(run, 1, directory, [weights.name])
        manifests.append(make_manifest(1).model_copy(update={"files": files}).model_dump_json().encode())
    earlier, valid = manifests
    accepted, rng, checkpoint = 0, random.Random(0), checkpoint_uri(run.uri, 1)
    with bucket_proxy(endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        for number in range(TRIES_WITH_DAMAGE):
            kind = ("flip", "swap", "cut off", "earlier")[number % 4]
            manifest = {"cut off": valid[: rng.randrange(len(valid))], "earlier": earlier}.get(kind, valid)
            run.write(checkpoint_key(1, MANIFEST_FILE), manifest)
            proxy.faults.clear()
            if kind in ("flip", "swap"):
                proxy.faults.append(
                    Fault(kind, key=weights.name, at=rng.randrange(SMALL_BYTES), content=bytes(SMALL_BYTES))
                )
            with suppress(CheckpointError):
                checkpoints.restore(checkpoint, restored)
                accepted += 1
            shutil.rmtree(restored, ignore_errors=True)
            proxy.requests.clear()
        proxy.faults.clear()
        run.write(checkpoint_key(1, MANIFEST_FILE), valid)
        checkpoints.restore(checkpoint, restored)  # the undamaged checkpoint is accepted
    os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
    return {f"accepted of {TRIES_WITH_DAMAGE} damaged": accepted}


if __name__ == "__main__":
    main()
