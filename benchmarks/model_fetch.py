"""Measure the time from the bucket to the built model: `make bench-model-fetch BASE=DIRECTORY` prints the ratio to an earlier version.

One worker on CPU fetches a model of 1.3 GB from the embedded bucket through a proxy with a round trip of 30 ms and 90 MB/s per
connection, and builds it with LoRA. The spans end when the worker reports the built model; they begin with

- `command`: the command;
- `worker`: the worker's function, before it has imported its libraries and requested the weights.

Each round runs both checkouts with an empty node cache, in alternating order; ratios are taken within a round.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.bucket import BYTES_PER_SECOND, LATENCY_SECONDS
from benchmarks.node_memory import make_files
from benchmarks.report import rounds_parser, spread, write_report
from tests.support.bucket_proxy import bucket_proxy
from tests.support.own_buckets import aws_variables
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket

BUCKET = "bench"
_WORKER_BEGINS = "… loading libraries"
_MODEL_BUILT = "model built"
_SPANS = ("command", "worker")


def main() -> None:
    parser = rounds_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="directory of the other checkout")
    arguments = parser.parse_args()
    checkouts = {"now": PROJECT, "before": arguments.base.resolve()}
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, ExitStack() as stack:
        directory = Path(temporary)
        os.environ[STATE_VARIABLE] = str(directory / "bucket")
        server = stack.enter_context(embedded_bucket())
        os.environ |= aws_variables(server)
        fill_bucket(directory)
        proxy = stack.enter_context(
            bucket_proxy(server.endpoint, latency_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND)
        )
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        for number in range(arguments.rounds):
            order = list(checkouts) if number % 2 else list(reversed(checkouts))
            measured.append(
                {"order": order}
                | {name: run(checkouts[name], directory, f"{name}-{number}") for name in order}
            )
            print(json.dumps(measured[-1]), flush=True)
    summary = {
        f"{span}_to_built_model_ratio": spread(
            [each["now"][span] / each["before"][span] for each in measured]
        )
        for span in _SPANS
    }
    write_report("model_fetch", summary, measured)


def fill_bucket(directory: Path) -> None:
    """Store a model of 1.3 GB in several files, and rows."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    make_files(directory, max_shard_size="350MB")
    files = {f"model/{path.name}": path for path in (directory / "model").iterdir()}
    open_store(f"s3://{BUCKET}").upload_many(files | {"train.jsonl": directory / "train.jsonl"})
    shutil.rmtree(directory / "model")


def run(checkout: Path, directory: Path, name: str) -> dict[str, float]:
    """Run main.py of a checkout for one step; return the seconds of each span."""
    settings = {
        "model_id": f"s3://{BUCKET}/model",
        "train_path": f"s3://{BUCKET}/train.jsonl",
        "storage_path": f"s3://{BUCKET}/runs",
        "output_dir": str(directory / "scratch"),
        "run_name": name,
        "device": "cpu",
        "dtype": "fp32",
        "num_devices": 1,
        "train_batch_size_per_device": 1,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "lora_config": {"r": 8},
    }
    config = directory / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    began = time.monotonic()
    worker = built = None
    with subprocess.Popen(
        [sys.executable, str(checkout / "main.py"), str(config), "--json"],
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if worker is None and line.startswith(_WORKER_BEGINS):
                worker = time.monotonic()
            if line.startswith(_MODEL_BUILT):
                built = time.monotonic()
    assert process.returncode == 0
    assert worker and built
    shutil.rmtree(directory / "scratch")  # the node cache
    return {"command": built - began, "worker": built - worker}


if __name__ == "__main__":
    main()
