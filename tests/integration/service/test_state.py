"""State in the bucket after kills, lost answers and requests at the same moment, against a real bucket."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from runs.layout import RunResult
from service import files, scheduler
from service.api import create_app
from service.config import LoadedService, load_service
from service.drivers import Checked, DriverState, JobDriver, Needs
from service.jobs import with_mark
from service.layout import active_key, content_key, files_of, jobs_of, metrics_key, model_key, run_store
from service.records import Record
from service.scheduler import Scheduler
from tests.support.bucket_proxy import Fault, bucket_proxy
from tests.support.own_buckets import set_up_own_bucket
from tests.support.ports import free_port
from tests.support.service import Api, rows, running_api, write_service
from tests.support.waiting import wait_until
from utils.storage.bucket import BucketError
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.retries import RetryPolicy
from utils.storage.s3 import S3Store

RETRY = {"x-stainless-retry-count": "1"}
REQUEST_THREADS = 40
"""Requests that a replica works on at a time: the threads of AnyIO."""
RESULT = {
    "status": "completed",
    "reason": "",
    "run_name": "run",
    "run_uri": "s3://runs/run",
    "best_checkpoint": "s3://runs/run/checkpoints/step-1",
    "last_checkpoint": "s3://runs/run/checkpoints/step-1",
    "eval_losses": [],
    "train_steps": 1,
    "tokens": 10,
    "trained_tokens": 5,
    "tokens_per_second": 1.0,
    "elapsed_seconds": 1.0,
    "parent": None,
    "trainable_parameters": 1,
    "log_files": [],
    "versions": {},
}


@pytest.fixture
def service(tmp_path: Path, bucket_uri: str) -> LoadedService:
    return load_service(write_service(tmp_path, bucket_uri, limits={"jobs": 3}))


@pytest.fixture
def store(service: LoadedService) -> S3Store:
    return S3Store(service.config.storage_path)


@pytest.fixture
def red(service: LoadedService) -> Iterator[Api]:
    with running_api(service) as (api,):
        yield api


@pytest.fixture
def scheduling(service: LoadedService, store: S3Store) -> Scheduler:
    return Scheduler(store, service, "")


def job_of(store: S3Store, job_id: str) -> Record:
    job = jobs_of(store, "red").get(job_id)
    assert job
    return job


def set_status(store: S3Store, job_id: str, status: str) -> Record:
    job = jobs_of(store, "red").update(job_id, lambda found: found | {"status": status})
    assert job
    return job


def models(api: Api) -> list[str]:
    return [model["id"] for model in api.get("/v1/models")["data"]]


def test_model_is_listed_exactly_while_it_can_be_retrieved(
    red: Api, store: S3Store, scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    running = set_status(store, job_id, "running")
    result = RunResult.model_validate(RESULT)

    def killed(*_: Any) -> None:
        raise BucketError("killed before the status was written")

    with monkeypatch.context() as patch:
        patch.setattr(scheduling, "_update", killed)
        with pytest.raises(BucketError):
            scheduling._succeed("red", running, result)
    assert models(red) == ["tiny"]
    scheduling._succeed("red", job_of(store, job_id), result)
    model = job_of(store, job_id)["fine_tuned_model"]
    for _ in range(2):  # before and after the scheduler's next round
        assert models(red) == ["tiny", model]
        assert red.get(f"/v1/models/{model}")["id"] == model
        scheduling._act("red", job_of(store, job_id), None, None)  # pyright: ignore[reportArgumentType]
    assert store.list(active_key("red")) == []
    red.delete(f"/v1/models/{model}")
    # A scheduler may have been killed before it saw the deletion.
    marker = model_key("red", model, job_of(store, job_id)["created_at"])
    store.write(marker, b"")
    scheduling._retire("red", job_of(store, job_id))
    assert models(red) == ["tiny"]


def test_model_whose_base_is_no_longer_offered_is_neither_listed_nor_answered(
    red: Api, store: S3Store, scheduling: Scheduler, tmp_path: Path, bucket_uri: str
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    scheduling._succeed("red", set_status(store, job_id, "running"), RunResult.model_validate(RESULT))
    scheduling._retire("red", job_of(store, job_id))
    model = job_of(store, job_id)["fine_tuned_model"]
    assert models(red) == ["tiny", model]
    changed = write_service(tmp_path, bucket_uri, models={"small": {"config": "base.yaml"}})
    with running_api(load_service(changed)) as (again,):
        again.get(f"/v1/models/{model}", 404)
        assert models(again) == ["small"]


def test_list_has_both_records_that_got_the_same_place(store: S3Store):
    records = files_of(store, "red")
    reserved = records.reserve()
    ids = [records.append(lambda identifier: {"id": identifier})["id"] for _ in range(2)]
    records.insert({"id": reserved})
    for ascending in (False, True):
        found, after = [], None
        while page := records.slice(after=after, limit=1, ascending=ascending):
            found += [record["id"] for record in page.records]
            if not page.has_more:
                break
            after = found[-1]
        assert sorted(found) == sorted([reserved, *ids])


def test_list_that_selects_records_reads_pages_at_the_same_time(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    records, read = files_of(store, "red"), store.read_if_exists
    ids = []
    for number in range(50):
        ids.append(f"file-{number:07x}{1:04x}{number:013x}")
        records._write(number, [{"id": ids[-1]}], None)
    active, most, reads, counting = 0, 0, 0, threading.Lock()

    def slow_read(key: str) -> bytes | None:
        nonlocal active, most, reads
        with counting:
            active, reads = active + 1, reads + 1
            most = max(most, active)
        time.sleep(0.02)
        with counting:
            active -= 1
        return read(key)

    monkeypatch.setattr(store, "read_if_exists", slow_read)
    wanted = {ids[5], ids[45]}
    for ascending in (True, False):
        ordered = ids if ascending else ids[::-1]
        found = records.slice(after=None, limit=100, ascending=ascending)
        assert found
        assert ([record["id"] for record in found.records], found.has_more) == (ordered, False)
        found = records.slice(
            after=ordered[9], limit=1, ascending=ascending, wanted=lambda record: record["id"] in wanted
        )
        assert found
        assert [record["id"] for record in found.records] == [ordered[45 if ascending else 44]]
    assert 4 <= most <= 16
    reads, most = 0, 0
    assert records.slice(after=None, limit=2)
    assert (reads, most) == (3, 1)


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize(
    ("after", "limit", "pages"),
    [(None, 100, 3), (9, 100, 3), (39, 100, 4), (370, 100, 1), (9, 10_000, 10), (0, 20, 1)],
)
def test_plain_list_reads_only_pages_that_it_returns(
    store: S3Store,
    monkeypatch: pytest.MonkeyPatch,
    after: int | None,
    limit: int,
    pages: int,
    ascending: bool,
):
    records, read = files_of(store, "red"), store.read_if_exists
    stored = [[f"file-{number:07x}{place:04x}{0:013x}" for place in range(1, 41)] for number in range(10)]
    for number, ids in enumerate(stored):
        records._write(number, [{"id": each} for each in ids], None)
    ordered = [each for ids in stored for each in ids][:: 1 if ascending else -1]
    keys: list[str] = []
    monkeypatch.setattr(store, "read_if_exists", lambda key: keys.append(key) or read(key))
    found = records.slice(after=None if after is None else ordered[after], limit=limit, ascending=ascending)
    assert found
    begin = 0 if after is None else after + 1
    assert [record["id"] for record in found.records] == ordered[begin : begin + limit]
    assert len(keys) == pages


def test_paused_job_keeps_its_files_and_is_counted(red: Api, store: S3Store, scheduling: Scheduler):
    file = red.upload(rows())["id"]
    job_id = red.create_job(file)["id"]
    red.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    scheduling._act("red", job_of(store, job_id), None, None)  # pyright: ignore[reportArgumentType]
    assert job_id in red.delete(f"/v1/files/{file}", 400)["error"]["message"]
    text = red.request("GET", "/metrics").text
    assert 'anneal_jobs{status="paused"} 1.0' in text
    red.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert red.delete(f"/v1/files/{file}")["deleted"]
    scheduling._act("red", job_of(store, job_id), None, None)  # pyright: ignore[reportArgumentType]
    assert store.list(active_key("red")) == []


def test_repeated_action_is_answered_as_the_first(red: Api, store: S3Store):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    path = f"/v1/fine_tuning/jobs/{job_id}"
    for action in ("pause", "resume", "cancel"):
        if action == "cancel":
            set_status(store, job_id, "running")
        first = red.post(f"{path}/{action}")
        assert red.post(f"{path}/{action}", headers=RETRY) == first
    assert len(job_of(store, job_id)["messages"]) == 5
    # The resumed job went on before the request was repeated.
    jobs_of(store, "red").update(
        job_id, lambda job: job | {"status": "running", "messages": job["messages"][:-1]}
    )
    assert red.post(f"{path}/resume", headers=RETRY)["status"] == "running"
    red.post(f"{path}/resume", status=400)
    red.post(f"{path}/pause")
    assert red.post(f"{path}/resume", headers=RETRY)["status"] == "validating_files"


def test_repeated_deletion_is_answered_as_the_first(red: Api, store: S3Store, scheduling: Scheduler):
    file = red.upload(rows())["id"]
    job_id = red.create_job(file)["id"]
    scheduling._succeed("red", set_status(store, job_id, "running"), RunResult.model_validate(RESULT))
    job = job_of(store, job_id)
    scheduling._retire("red", job)
    for path in (f"/v1/files/{file}", f"/v1/models/{job['fine_tuned_model']}"):
        first = red.delete(path)
        assert red.request("DELETE", path, headers=RETRY).json() == first
        red.delete(path, 404)
    never = [f"/v1/files/{file[:-4]}0000", f"/v1/models/{job['fine_tuned_model'][:-4]}0000"]
    for path in ("/v1/files/file-none", "/v1/models/ft:tiny:red::00", *never):
        assert red.request("DELETE", path, headers=RETRY).status_code == 404


def test_contents_without_a_record_are_deleted_by_the_second_sweep(red: Api, store: S3Store):
    file = red.upload(rows())
    killed = {content_key(project, "killed.jsonl") for project in ("red", "blue")}
    slow = content_key("red", "slow.jsonl")
    for key in (*killed, slow):
        store.write(key, b"x" * 100)
    suspects = files.delete_orphans(store, ())
    assert suspects == {*killed, slow}
    assert len(store.list("content/")) == 4
    # The record of an upload is stored after its content, whose age S3 counts from the begin of the upload.
    template = files_of(store, "red").get(file["id"])
    assert template
    files_of(store, "red").append(lambda new: template | {"id": new, "content": "slow.jsonl"})
    assert files.delete_orphans(store, suspects) == set()
    assert {item.key for item in store.list("content/")}.isdisjoint(killed)
    assert len(store.list("content/")) == 2


def test_markers_of_deleted_files_are_deleted_after_an_hour(
    red: Api, store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    hour = 500_000
    monkeypatch.setattr(files, "_hour", lambda: hour)
    paths = [f"/v1/files/{red.upload(rows())['id']}" for _ in range(3)]
    for path in paths:
        red.delete(path)
    hour += 1
    files.delete_orphans(store, ())
    assert [red.request("DELETE", path, headers=RETRY).status_code for path in paths] == [200] * 3
    hour += 1
    files.delete_orphans(store, ())
    assert store.list("deleted/") == []
    assert red.request("DELETE", paths[0], headers=RETRY).status_code == 404


def test_marks_of_a_long_job_have_a_limit_and_keep_their_order():
    job: Record = {"marks": []}
    for step in range(1, 5001):
        job = with_mark(job, step)
    steps = [step for step, _ in job["marks"]]
    assert len(steps) <= 200
    assert steps == sorted(set(steps))
    assert steps[-100:] == list(range(4901, 5001))


def test_jobs_at_a_time_are_limited_in_all_requests(red: Api, store: S3Store):
    file = red.upload(rows())["id"]
    body = {"model": "tiny", "training_file": file}

    def create(seed: int) -> int:
        return red.request("POST", "/v1/fine_tuning/jobs", json=body | {"seed": seed}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(create, range(8)))
    # Of requests at the same moment, fewer than the limit may be accepted, but never more.
    assert 1 <= statuses.count(200) <= 3
    statuses += [create(seed) for seed in range(8, 16)]
    assert statuses.count(200) == 3
    assert set(statuses) == {200, 429}
    markers = [item.key.rpartition("/")[2] for item in store.list(active_key("red"))]
    assert len(markers) == 3
    assert len(jobs_of(store, "red").get_many(markers)) == 3


def test_ended_jobs_are_not_counted_before_the_scheduler_has_seen_their_end(red: Api, store: S3Store):
    file = red.upload(rows())["id"]
    ids = [red.create_job(file, seed=seed)["id"] for seed in range(3)]
    body = {"model": "tiny", "training_file": file, "seed": 3}
    assert red.request("POST", "/v1/fine_tuning/jobs", json=body).status_code == 429
    red.post(f"/v1/fine_tuning/jobs/{ids[1]}/cancel")
    assert red.post("/v1/fine_tuning/jobs", body)["status"] == "validating_files"
    assert red.request("POST", "/v1/fine_tuning/jobs", json=body | {"seed": 4}).status_code == 429
    assert len(store.list(active_key("red"))) == 4


def test_resume_waits_for_the_limit_of_jobs(red: Api, store: S3Store):
    file = red.upload(rows())["id"]
    ids = [red.create_job(file, seed=seed)["id"] for seed in range(3)]
    red.post(f"/v1/fine_tuning/jobs/{ids[0]}/pause")
    store.delete([active_key("red", ids[0])])  # as earlier versions did
    red.create_job(file, seed=3)
    answer = red.request("POST", f"/v1/fine_tuning/jobs/{ids[0]}/resume")
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 120
    red.post(f"/v1/fine_tuning/jobs/{ids[1]}/cancel")
    assert red.post(f"/v1/fine_tuning/jobs/{ids[0]}/resume")["status"] == "validating_files"
    assert active_key("red", ids[0]) in [item.key for item in store.list(active_key("red"))]


@pytest.mark.slow
def test_bucket_that_does_not_answer_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    app = create_app(load_service(write_service(tmp_path, "s3://gone/service")), {})

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client:
            return await client.get("/v1/models", headers={"Authorization": "Bearer sk-x"})

    began = time.monotonic()
    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["retry-after"]
    assert answer.headers["x-request-id"]
    assert time.monotonic() - began < 30


def test_short_outage_neither_loses_an_upload_nor_truncates_a_download(
    tmp_path: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    uri = set_up_own_bucket(monkeypatch, bucket, "outages")
    monkeypatch.setattr("service.api.REQUEST", RetryPolicy(silence=10, failing=0))
    with bucket_proxy(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with running_api(load_service(write_service(tmp_path, f"{uri}/{tmp_path.name}"))) as (red,):
            proxy.faults.append(Fault("reject", "PUT", key="/files/999999999.json", times=3))
            file = red.upload(rows())["id"]
            proxy.faults.append(Fault("reject", key=".jsonl", times=3))
            assert red.request("GET", f"/v1/files/{file}/content").content == rows()
    assert [fault.times_injected for fault in proxy.faults] == [3, 3]


@pytest.mark.slow
def test_requests_that_wait_for_the_bucket_do_not_delay_keys_and_health(
    tmp_path: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    uri = set_up_own_bucket(monkeypatch, bucket, "stalls")
    monkeypatch.setattr("service.api.REQUEST", RetryPolicy(silence=8, failing=0))
    with bucket_proxy(bucket.endpoint) as proxy, ThreadPoolExecutor(60) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with running_api(load_service(write_service(tmp_path, f"{uri}/{tmp_path.name}"))) as (red,):
            path = f"/v1/files/{red.upload(rows())['id']}"
            stall = Fault("stall", key="/files/999999999.json", at=0)
            proxy.faults.append(stall)
            waiting = [pool.submit(red.request, "GET", path) for _ in range(60)]
            wait_until(lambda: stall.times_injected >= REQUEST_THREADS)
            assert red.request("GET", "/healthz").status_code == 200
            assert Api(red.url, "sk-unknown").request("GET", path).status_code == 401
            assert not any(each.done() for each in waiting)
            assert {each.result().status_code for each in waiting} == {503}


def test_damaged_record_of_a_key_has_an_error_object(red: Api, store: S3Store):
    (key,) = store.list("keys/")
    store.write(key.key, b"{")
    assert red.get("/v1/models", 500)["error"]["type"] == "server_error"


def test_all_stores_of_a_service_use_one_client(store: S3Store):
    run = run_store(store, "red", "ftjob-1")
    run.write("result.json", b"{}")
    assert store.read("runs/red/ftjob-1/result.json") == b"{}"
    assert run._client() is store._client()


def test_check_of_a_cancelled_job_is_cancelled(
    red: Api, store: S3Store, scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    cancelled: list[str] = []
    monkeypatch.setattr(scheduler.ray, "cancel", cancelled.append)
    for seed, action in enumerate(("pause", "cancel")):
        job_id = red.create_job(red.upload(rows())["id"], seed=seed)["id"]
        scheduling._memory.checks[job_id] = f"check of {action}"
        red.post(f"/v1/fine_tuning/jobs/{job_id}/{action}")
        scheduling._act("red", job_of(store, job_id), None, None)  # pyright: ignore[reportArgumentType]
    assert cancelled == ["check of pause", "check of cancel"]


def test_unexpected_error_in_one_job_ends_only_that_job(
    red: Api, store: S3Store, scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    file = red.upload(rows())["id"]
    broken, other = (red.create_job(file, seed=seed)["id"] for seed in range(2))
    acted = []

    def act(project: str, job: Record, driver: Any, free: Any) -> None:
        acted.append(job["id"])
        if job["id"] == broken:
            raise KeyError("a bug")

    monkeypatch.setattr(scheduling, "_act", act)
    monkeypatch.setattr(scheduler, "find_driver", lambda job_id: None)
    for _ in range(scheduler._MAX_ATTEMPTS):
        scheduling.round()
    assert acted.count(other) == scheduler._MAX_ATTEMPTS
    assert job_of(store, broken)["status"] == "failed"
    assert "KeyError" in job_of(store, broken)["error"]["message"]
    assert job_of(store, other)["status"] == "validating_files"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_dir": "/dev/null/scratch"}, "output_dir"),
        ({"key_of_another_version": 1}, "key_of_another_version"),
    ],
)
def test_job_whose_driver_cannot_be_constructed_fails_with_the_reason(
    red: Api,
    store: S3Store,
    scheduling: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    config = yaml.safe_load(scheduling._config_of("red", set_status(store, job_id, "running"))) | changes
    killed: list[Any] = []
    monkeypatch.setattr(scheduler.ray, "kill", killed.append)
    monkeypatch.setattr(scheduler, "driver_state", lambda driver, timeout: driver.state())
    for _ in range(scheduler._MAX_ATTEMPTS):
        driver = JobDriver(yaml.safe_dump(config), job_id, "")
        scheduling._act("red", job_of(store, job_id), driver, None)  # pyright: ignore[reportArgumentType]
    job = job_of(store, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "server_error")
    assert reason in job["error"]["message"]
    assert len(killed) == scheduler._MAX_ATTEMPTS


def test_only_the_owner_can_read_what_a_driver_prints(
    red: Api, store: S3Store, scheduling: Scheduler, tmp_path: Path
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    config = yaml.safe_load(scheduling._config_of("red", set_status(store, job_id, "running")))
    driver = JobDriver(yaml.safe_dump(config | {"output_dir": str(tmp_path)}), job_id, "127.0.0.1:1")
    assert driver._process is not None
    driver._process.kill()
    driver._process.wait()
    assert (tmp_path / "jobs" / f"{job_id}.stderr").exists()
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700


def test_only_failures_without_progress_fail_a_job(
    red: Api, store: S3Store, scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    set_status(store, job_id, "running")
    exited = DriverState(1, False, "error: the disk is full")
    monkeypatch.setattr(scheduler.ray, "kill", lambda driver: None)
    monkeypatch.setattr(scheduler, "driver_state", lambda driver, timeout: exited)

    def fail(times: int) -> str:
        for _ in range(times):
            scheduling._act("red", job_of(store, job_id), "driver", None)  # pyright: ignore[reportArgumentType]
        return job_of(store, job_id)["status"]

    for step in (1, 2, 3):
        line = {"step": step, "epoch": 0.1, "loss": 1.0}
        store.write(metrics_key("red", job_id), json.dumps(line).encode() + b"\n")
        assert fail(scheduler._MAX_ATTEMPTS - 1) == "running"
    assert fail(1) == "failed"


def test_failed_checks_of_a_job_are_not_counted_after_validation(
    red: Api, store: S3Store, scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    job_id = red.create_job(red.upload(rows())["id"])["id"]
    for _ in range(scheduler._MAX_ATTEMPTS - 1):
        scheduling._failed_attempt("red", job_of(store, job_id), "a node was lost")
    monkeypatch.setattr(scheduler.ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(scheduler.ray, "get", lambda reference: Checked(Needs({"CPU": 1.0}, 1), 10, "", None))
    scheduling._memory.checks[job_id] = "check"
    scheduling._act("red", job_of(store, job_id), None, None)  # pyright: ignore[reportArgumentType]
    assert job_of(store, job_id)["status"] == "queued"
    scheduling._failed_attempt("red", job_of(store, job_id), "a node was lost")
    assert job_of(store, job_id)["status"] == "queued"


@pytest.mark.timeout(60)
def test_scheduler_continues_after_an_unexpected_error(
    scheduling: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    rounds = []

    def fail() -> None:
        rounds.append(1)
        if len(rounds) == 2:
            scheduling.stop()
        raise RuntimeError("a bug")

    monkeypatch.setattr(scheduling, "round", fail)
    scheduling.run()
    assert len(rounds) == 2
