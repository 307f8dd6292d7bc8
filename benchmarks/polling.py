"""Measure what clients that poll a job take from its training: `make bench-polling` prints the ratio to undisturbed training.

`main.py serve` trains a tiny model on CPU, with one thread; the service and the clients have the other cores. 100 clients ask for the
running job and for its newest events, each once a second for a minute.

Each round measures steps/s before, with and after the clients. The ratio is to the mean of before and after.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from tests.support.polling import LongJob, start_long_job
from tests.support.served import served
from tests.support.service import write_service
from tests.support.tiny_model import make_model
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket

CLIENTS, POLLED_SECONDS, UNDISTURBED_SECONDS = 100, 60, 30


def main() -> None:
    rounds = rounds_parser(__doc__).parse_args().rounds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary)
        os.environ[STATE_VARIABLE] = str(directory / "bucket")
        base = {
            "output_dir": str(directory / "scratch"),
            "train_batch_size_per_device": 4,
            "worker_resources": {"CPU": 1},
        }
        config = write_service(
            directory,
            "s3://anneal/service",
            str(make_model(directory / "model")),
            base,
            limits={"requests_per_minute": 10**6},
        )
        rows = write_problems(TRAIN_KINDS, 8192, 1).encode()
        with embedded_bucket(), served(config) as service:
            job = start_long_job(service, rows, directory / "scratch", hyperparameters={"n_epochs": 50})
            measured = [measure(job) for _ in range(rounds)]
            job.cancel()
    statuses = sum((Counter(each["answers"]) for each in measured), Counter[str]())
    assert set(statuses) == {"200"}, statuses
    ratios = [2 * each["polled"] / (each["before"] + each["after"]) for each in measured]
    answers = [each["answers"]["200"] / POLLED_SECONDS for each in measured]
    summary = {"polled_to_undisturbed_steps": spread(ratios), "answers_per_second": spread(answers)}
    write_report("polling", summary, measured)


def measure(job: LongJob) -> dict[str, Any]:
    """Return steps/s before, with and after the clients, and how often each status was answered."""
    before, _ = job.speed(0, UNDISTURBED_SECONDS)
    polled, statuses = job.speed(CLIENTS, POLLED_SECONDS)
    after, _ = job.speed(0, UNDISTURBED_SECONDS)
    answers = {str(status): count for status, count in statuses.items()}
    measured = {"before": before, "polled": polled, "after": after, "answers": answers}
    print(json.dumps(measured), flush=True)
    return measured


if __name__ == "__main__":
    main()
