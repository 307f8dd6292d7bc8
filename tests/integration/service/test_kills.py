"""Kill any process of the service with SIGKILL at any stage: each job ends once, with the weights of an undisturbed one.

`make test-all` kills twice, `make test-service` 40 times (SERVICE_GRID=1). One cell of the grid:

    SERVICE_GRID=1 python -m pytest tests/integration/service/test_kills.py -k "worker and uploading"
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from runs.layout import RESULT_FILE
from runs.reading import best, committed
from service.layout import run_store
from tests.support.ports import free_port
from tests.support.served import OPENAI, Served, served
from tests.support.service import write_service
from utils.storage.bucket import EMBEDDED_BUCKET
from utils.storage.s3 import S3Store

GRID = bool(os.environ.get("SERVICE_GRID"))
PROCESSES = {
    "replica": "ServeReplica:fine-tuning:api",
    "scheduler": "ServeReplica:fine-tuning:scheduler",
    "engine": "ServeReplica:fine-tuning:engine",
    "check": "ray::check_job",
    "driver": "ray::JobDriver",
    "worker": "RayTrainWorker",
    "controller": "ray::ServeController",
}
STAGES = ("uploading", "validating", "queued", "first steps", "checkpoint", "result file", "chat")
ANSWERING = ("replica", "all", "engine")
"""Processes whose end may break off an answer."""
Kill = tuple[str, str]

# Each list is one job, with its kills in the order of the stages.
SAMPLE: list[list[Kill]] = [[("driver", "checkpoint"), ("all", "checkpoint")]]
FULL: list[list[Kill]] = [
    *([kill] for kill in itertools.product(("replica", "scheduler", "driver", "worker", "all"), STAGES)),
    [("check", "validating")],
    [("controller", "first steps")],
    [("engine", "chat")],
    [("all", "first steps"), ("all", "checkpoint")],
]
JOBS = FULL if GRID else SAMPLE
ROWS = write_problems(TRAIN_KINDS, 32, 1).encode()
QUESTION = {"role": "user", "content": "Ada has 3 apples and buys 4. How many?"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not OPENAI.is_dir(), reason="the packages of the service are not installed: make setup-dev"
    ),
]


@dataclass
class Site:
    """A service that is killed and started again."""

    config: Path
    storage: str
    port: int = field(default_factory=free_port)
    key: str | None = None
    service: Served | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    files: list[str] = field(default_factory=list)
    """Ids of all uploads that were answered."""

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
            with suppress(psutil.NoSuchProcess):  # it has just exited
                process.kill()
        psutil.wait_procs(found, timeout=30)

    def send(self, method: str, path: str, *, repeats: int = 0, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}", "x-stainless-retry-count": str(repeats)}
        headers |= options.pop("headers", {})
        url = f"http://127.0.0.1:{self.port}/v1{path}"
        return requests.request(method, url, headers=headers, timeout=60, **options)

    def ask(self, method: str, path: str, **options: Any) -> tuple[Any, int]:
        """Return the JSON of an answer, and how often the request was sent: clients repeat it while the service is being replaced."""
        deadline = time.monotonic() + 240
        for attempt in itertools.count(1):
            sent = {name: option() if callable(option) else option for name, option in options.items()}
            try:
                answer = self.send(method, path, repeats=attempt - 1, **sent)
                if answer.status_code < 500:
                    assert answer.status_code == 200, answer.text
                    return answer.json(), attempt
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, f"{method} {path} is not answered"
            time.sleep(0.2)
        raise AssertionError

    def get(self, path: str) -> Any:
        """Return the JSON of a resource or a list."""
        return self.ask("GET", path)[0]

    def upload(self, in_the_middle: Callable[[], None] = lambda: None) -> tuple[str, int]:
        """Upload the rows; call a function after the first half. Return the file's id, and how often it was sent."""
        head = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        name = f"rows-{len(self.files)}.jsonl"  # of an earlier upload, a repetition would return that file
        head += f'--B\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        interrupt = iter([in_the_middle])

        def content() -> Iterator[bytes]:
            yield head + ROWS[: len(ROWS) // 2]
            next(interrupt, lambda: None)()
            yield ROWS[len(ROWS) // 2 :] + b"\r\n--B--\r\n"

        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        found, attempts = self.ask("POST", "/files", data=content, headers=kind)
        self.files.append(found["id"])
        return self.files[-1], attempts

    def create(self, file: str) -> str:
        """Create a job with the same seed as the others; return its id. It trains for seconds after its first checkpoint."""
        body = {"model": "tiny", "training_file": file, "seed": 3, "hyperparameters": {"n_epochs": 16}}
        body["metadata"] = {"n": str(time.time_ns())}
        return self.ask("POST", "/fine_tuning/jobs", json=body)[0]["id"]

    def chat(self, model: str, at_first: Callable[[], None] = lambda: None) -> tuple[str, int]:
        """Return the greedy answer of a model and how often it was asked; call a function at the first chunk."""
        body = {"model": model, "messages": [QUESTION], "max_tokens": 300, "temperature": 0, "stream": True}
        deadline = time.monotonic() + 240
        for attempt in itertools.count(1):
            text = ""
            try:
                with self.send("POST", "/chat/completions", json=body, stream=True) as answer:
                    assert answer.status_code in (200, 500, 502, 503), answer.text
                    for line in filter(None, answer.iter_lines()):
                        if line == b"data: [DONE]":
                            return text, attempt
                        if not line.startswith(b"data: "):
                            break
                        chunk = json.loads(line.removeprefix(b"data: "))
                        for choice in chunk.get("choices", ()):
                            text += choice["delta"].get("content") or ""
                        at_first()
                        at_first = lambda: None  # noqa: E731
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, f"{model} does not answer"
            time.sleep(0.2)
        raise AssertionError

    def job(self, job_id: str) -> Any:
        return self.get(f"/fine_tuning/jobs/{job_id}")

    def run(self, job_id: str) -> Any:
        return run_store(S3Store(self.storage), "default", job_id)

    def wait_for(self, job_id: str, stage: str) -> None:
        """Wait until a job has reached a stage."""
        reached: dict[str, Callable[[], bool]] = {
            "validating": lambda: True,
            "queued": lambda: self.job(job_id)["status"] != "validating_files",
            "first steps": lambda: self.job(job_id)["status"] in ("running", "succeeded"),
            "checkpoint": lambda: bool(committed(self.run(job_id))),
            "result file": lambda: self.run(job_id).read_if_exists(RESULT_FILE) is not None,
            "end": lambda: self.job(job_id)["status"] not in ("validating_files", "queued", "running"),
        }
        deadline = time.monotonic() + 900
        while not reached[stage]():
            assert time.monotonic() < deadline, (stage, self.job(job_id))
            time.sleep(0.05)

    def weights_of(self, job_id: str) -> str:
        """Return the hash of the weights of a job's model."""
        run = self.run(job_id)
        chosen = best(committed(run))
        assert chosen
        return hashlib.sha256(
            run.read(f"checkpoints/step-{chosen.step:06d}/adapter_model.safetensors")
        ).hexdigest()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, bucket: Any, tiny_model: Path) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("kills")
    storage = f"s3://{EMBEDDED_BUCKET}/kills-{time.time_ns()}"
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


@dataclass(frozen=True)
class Undisturbed:
    """A job without kills: the hash of its weights, and its model's answer."""

    weights: str
    answer: str


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Undisturbed:
    job = site.create(site.upload()[0])
    site.wait_for(job, "end")
    answer, _ = site.chat(site.job(job)["fine_tuned_model"])
    assert len(answer) > 20
    return Undisturbed(site.weights_of(job), answer)


def disturb(site: Site, kills: list[Kill], expected: Undisturbed) -> list[str]:
    """Run a job and kill processes at its stages; return the ids of all jobs that were created, newest first."""
    at = {stage: victim for victim, stage in kills}
    jobs: list[str] = []

    def start_another() -> str:
        """Start a job whose driver or worker is killed while the other job has none."""
        jobs.insert(0, site.create(site.files[0]))
        return jobs[0]

    if any(at.get(stage) in ("driver", "worker") for stage in ("uploading", "validating", "queued")):
        site.wait_for(start_another(), "first steps")
    file, attempts = site.upload(lambda: site.kill(at["uploading"]) if "uploading" in at else None)
    assert attempts == 1 or at.get("uploading") in ANSWERING
    job = site.create(file)
    jobs.insert(0, job)
    for victim, stage in kills:
        if stage in ("uploading", "chat"):
            continue
        site.wait_for(job, stage)
        if stage == "result file" and victim in ("driver", "worker"):
            start_another()
        site.kill(victim)
    site.wait_for(job, "end")
    if at.get("chat") in ("driver", "worker"):
        start_another()
    answer, attempts = site.chat(
        site.job(job)["fine_tuned_model"], lambda: site.kill(at["chat"]) if "chat" in at else None
    )
    assert answer == expected.answer
    assert attempts == 1 or at.get("chat") in ANSWERING
    for each in jobs:
        site.wait_for(each, "end")
    return jobs


@pytest.mark.parametrize(
    "kills", JOBS, ids=lambda kills: ", ".join(f"{victim} at {stage}" for victim, stage in kills)
)
def test_killed_job_ends_once_with_the_same_weights(site: Site, undisturbed: Undisturbed, kills: list[Kill]):
    before = [each["id"] for each in site.get("/fine_tuning/jobs?limit=100")["data"]]
    created = disturb(site, kills, undisturbed)
    for job in created:
        assert site.job(job)["status"] == "succeeded", site.job(job)
        assert site.weights_of(job) == undisturbed.weights
        events = site.get(f"/fine_tuning/jobs/{job}/events?limit=100")["data"]
        assert [event["message"] for event in events].count("The job has successfully completed") == 1
    jobs = site.get("/fine_tuning/jobs?limit=100")["data"]
    assert [each["id"] for each in jobs] == [*created, *before]
    results = [file for each in jobs for file in each["result_files"]]
    assert len(results) == len(jobs)
    stored = [file["id"] for file in site.get("/files")["data"]]
    assert sorted(stored) == sorted([*results, *site.files])
    assert len(site.get("/models")["data"]) == 1 + len(jobs)
