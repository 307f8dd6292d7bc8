"""Kill any process of the service with SIGKILL at any stage: each job ends once, with the weights of an undisturbed one.

`make test-all` kills twice, `make test-service` 40 times (SERVICE_GRID=1).
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from runs.layout import RESULT_FILE
from runs.reading import best, committed
from service.layout import run_uri
from tests.support.served import OPENAI, Served, free_port, served
from tests.support.service import write_service
from utils.storage.bucket import open_store
from utils.storage.s3 import S3Store

GRID = bool(os.environ.get("SERVICE_GRID"))
PROCESSES = {
    "replica": "ServeReplica:fine-tuning:api",
    "scheduler": "ServeReplica:fine-tuning:scheduler",
    "check": "ray::check_job",
    "driver": "ray::JobDriver",
    "worker": "RayTrainWorker",
    "controller": "ray::ServeController",
}
STAGES = ("uploading", "validating", "queued", "starting", "first checkpoint", "last checkpoint")
# Each list is one job, with its kills in the order of the stages.
SAMPLE = [[("driver", "first checkpoint"), ("all", "first checkpoint")]]
FULL = [
    [("replica", stage) for stage in STAGES],
    [("scheduler", stage) for stage in STAGES],
    [("all", stage) for stage in STAGES],
    [("driver", stage) for stage in STAGES[3:]],
    [("worker", stage) for stage in STAGES[3:5]],
    [
        ("check", "validating"),
        ("replica", "queued"),
        ("controller", "starting"),
        ("worker", "first checkpoint"),
    ],
    [
        ("scheduler", "validating"),
        ("replica", "queued"),
        ("driver", "starting"),
        ("worker", "first checkpoint"),
    ],
    [
        ("replica", "uploading"),
        ("scheduler", "starting"),
        ("all", "first checkpoint"),
        ("driver", "last checkpoint"),
    ],
    [("all", "validating"), ("all", "starting"), ("all", "first checkpoint"), ("all", "last checkpoint")],
    [("controller", "validating")],
]
JOBS = FULL if GRID else SAMPLE
ROWS = write_problems(TRAIN_KINDS, 32, 1).encode()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200 if GRID else 1200),
    pytest.mark.skipif(
        not OPENAI.is_dir(), reason="the packages of the service are not installed: make setup-dev"
    ),
]


def test_full_grid_has_40_kills():
    assert sum(map(len, FULL)) == 40


@dataclass
class Site:
    """A service that is killed and started again."""

    config: Path
    storage: str
    port: int = field(default_factory=free_port)
    key: str | None = None
    service: Served | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        self.service = self.stack.enter_context(served(self.config, self.port))
        self.key = self.key or self.service.key

    def kill(self, victim: str) -> None:
        assert self.service
        if victim == "all":
            self.stack.close()
            self.start()
            return
        deadline = time.monotonic() + 120
        while not (found := self.service.descendants(PROCESSES[victim])):
            assert time.monotonic() < deadline, f"there is no {victim}"
            time.sleep(0.05)
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=30)

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON of an answer; repeat the request while the service is being replaced, as clients do."""
        deadline = time.monotonic() + 240
        while True:
            try:
                answer = requests.request(
                    method,
                    f"http://127.0.0.1:{self.port}/v1{path}",
                    headers={"Authorization": f"Bearer {self.key}", "x-stainless-retry-count": "1"},
                    timeout=30,
                    **options,
                )
                if answer.status_code < 500:
                    assert answer.status_code == 200, answer.text
                    return answer.json()
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, f"{method} {path} is not answered"
            time.sleep(0.2)

    def job(self, job_id: str) -> Any:
        return self.ask("GET", f"/fine_tuning/jobs/{job_id}")

    def run(self, job_id: str) -> Any:
        return open_store(run_uri(S3Store(self.storage), "default", job_id))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bucket: Any, tiny_model: Path) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("kills")
    storage = f"s3://{bucket.bucket}/kills-{time.time_ns()}"
    base = {
        "output_dir": str(directory / "scratch"),
        "train_batch_size_per_device": 8,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 4},
        "max_failures": 20,
    }
    limits = {"requests_per_minute": 100_000, "jobs": 100}
    found = Site(write_service(directory, storage, str(tiny_model), base, limits=limits), storage)
    with found.stack:
        found.start()
        yield found


def wait_for(site: Site, job_id: str, stage: str) -> None:
    """Wait until a job has reached a stage."""
    reached: dict[str, Callable[[], bool]] = {
        "validating": lambda: True,
        "queued": lambda: site.job(job_id)["status"] != "validating_files",
        "starting": lambda: site.job(job_id)["status"] in ("running", "succeeded"),
        "first checkpoint": lambda: bool(committed(site.run(job_id))),
        "last checkpoint": lambda: site.run(job_id).read_if_exists(RESULT_FILE) is not None,
    }
    deadline = time.monotonic() + 600
    while not reached[stage]():
        assert time.monotonic() < deadline, (stage, site.job(job_id))
        time.sleep(0.05)


def create(site: Site, kills: list[tuple[str, str]], rows: bytes) -> str:
    """Create a job with the same seed as the others, and kill processes at its stages; return its id when it has ended."""
    upload = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", rows)}}
    file = site.ask("POST", "/files", **upload)["id"]
    for victim, stage in kills:
        if stage == "uploading":
            site.kill(victim)
            file = site.ask("POST", "/files", **upload)["id"]
    hyperparameters = {"n_epochs": 8}
    body = {"model": "tiny", "training_file": file, "seed": 3, "hyperparameters": hyperparameters}
    job = site.ask("POST", "/fine_tuning/jobs", json=body | {"metadata": {"n": str(time.time_ns())}})["id"]
    for victim, stage in kills:
        if stage != "uploading":
            wait_for(site, job, stage)
            if site.job(job)["status"] != "succeeded" or victim in ("replica", "scheduler", "all"):
                site.kill(victim)
    deadline = time.monotonic() + 900
    while (record := site.job(job))["status"] != "succeeded":
        assert record["status"] in ("validating_files", "queued", "running"), record
        assert time.monotonic() < deadline, record
        time.sleep(0.2)
    assert site.ask("GET", f"/files/{file}")["bytes"] == len(rows)
    return job


def weights_of(site: Site, job_id: str) -> str:
    run = site.run(job_id)
    chosen = best(committed(run))
    assert chosen
    return hashlib.sha256(
        run.read(f"checkpoints/step-{chosen.step:06d}/adapter_model.safetensors")
    ).hexdigest()


@pytest.fixture(scope="module")
def expected(site: Site) -> str:
    """Return the hash of the weights of an undisturbed job."""
    return weights_of(site, create(site, [], ROWS))


@pytest.mark.parametrize("kills", JOBS, ids=lambda kills: f"{len(kills)} kills, first {kills[0][0]}")
def test_killed_job_ends_once_with_the_same_weights(site: Site, expected: str, kills: list[tuple[str, str]]):
    before = site.ask("GET", "/fine_tuning/jobs?limit=100")["data"]
    job = create(site, kills, ROWS)
    assert weights_of(site, job) == expected
    events = site.ask("GET", f"/fine_tuning/jobs/{job}/events?limit=100")["data"]
    assert [event["message"] for event in events].count("The job has successfully completed") == 1
    jobs = site.ask("GET", "/fine_tuning/jobs?limit=100")["data"]
    assert [each["id"] for each in jobs] == [job, *(each["id"] for each in before)]
    results = [file for each in jobs for file in each["result_files"]]
    stored = [
        file["id"] for file in site.ask("GET", "/files")["data"] if file["purpose"] == "fine-tune-results"
    ]
    assert sorted(results) == sorted(stored)
    assert len(stored) == len(jobs)
    assert len(site.ask("GET", "/models")["data"]) == 1 + len(jobs)
