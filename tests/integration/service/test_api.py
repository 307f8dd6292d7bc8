"""Files, jobs, models, keys and limits of the API, against a real bucket."""

import asyncio
import json
import secrets
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from starlette.requests import Request

from service import progress
from service.config import LoadedService, load_service
from service.files import Files
from service.keys import Caller, KeysError, create_key, list_keys, revoke_keys
from service.layout import active_key, content_key, files_of, jobs_of, metrics_key
from service.records import Record, Records
from service.requests import RETRY_SECONDS
from tests.support.grids import only_in_test_service
from tests.support.service import CHAT, Api, rows, running_api, write_service
from tests.support.waiting import wait_until
from utils.storage.bucket import BucketError, NotFoundError
from utils.storage.embedded_bucket import EMBEDDED_BUCKET, EmbeddedBucket
from utils.storage.s3 import UPLOAD_PART_BYTES, S3Store


@pytest.fixture
def service(tmp_path: Path, bucket_uri: str) -> LoadedService:
    return load_service(write_service(tmp_path, bucket_uri))


@pytest.fixture
def store(service: LoadedService) -> S3Store:
    return S3Store(service.config.storage_path)


@pytest.fixture
def apis(service: LoadedService) -> Iterator[list[Api]]:
    with running_api(service, ["red", "blue"]) as found:
        yield found


@pytest.fixture(scope="module")
def any_api(tmp_path_factory: pytest.TempPathFactory, bucket: EmbeddedBucket) -> Iterator[Api]:
    """An API for requests whose answer does not depend on what other tests store."""
    uri = f"s3://{EMBEDDED_BUCKET}/any-{secrets.token_hex(6)}"
    with running_api(load_service(write_service(tmp_path_factory.mktemp("any"), uri))) as (api,):
        yield api


@pytest.fixture(scope="module")
def any_file(any_api: Api) -> str:
    """Return the id of a training file of `any_api`."""
    return any_api.upload(rows())["id"]


def ids(listing: Any) -> list[str]:
    return [item["id"] for item in listing["data"]]


def test_file_is_stored_listed_read_and_deleted(apis: list[Api]):
    red, blue = apis
    content = rows(CHAT, CHAT)
    file = red.upload(content)
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(content), "rows.jsonl", "fine-tune")
    assert red.get(f"/v1/files/{file['id']}") == file
    assert red.request("GET", f"/v1/files/{file['id']}/content").content == content
    assert ids(red.get("/v1/files")) == [file["id"]]
    assert ids(red.get("/v1/files?purpose=other")) == []
    assert ids(blue.get("/v1/files")) == []
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
        assert blue.get(path, 404)["error"]["param"] == "id"
    blue.delete(f"/v1/files/{file['id']}", 404)
    assert red.delete(f"/v1/files/{file['id']}")["deleted"]
    red.get(f"/v1/files/{file['id']}", 404)


def test_upload_is_streamed_in_parts(apis: list[Api], store: S3Store):
    content = secrets.token_bytes(2 * UPLOAD_PART_BYTES + 1_000_000)
    file = apis[0].upload(content)
    assert apis[0].request("GET", f"/v1/files/{file['id']}/content").content == content


@pytest.mark.parametrize("size", [UPLOAD_PART_BYTES, UPLOAD_PART_BYTES + 1])
def test_upload_of_complete_parts_is_stored(apis: list[Api], size: int):
    content = b"x" * size
    file = apis[0].upload(content)
    assert file["bytes"] == size
    assert apis[0].request("GET", f"/v1/files/{file['id']}/content").content == content


def begin_upload(api: Api, content: bytes) -> socket.socket:
    """Send the begin of a large upload."""
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return begin_request(api, "/v1/files", "multipart/form-data; boundary=B", part + content)


def begin_request(api: Api, path: str, kind: str, content: bytes) -> socket.socket:
    """Send a request with the begin of a large body."""
    host, port = api.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: 100000000\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_slow_uploads_do_not_delay_other_uploads(apis: list[Api]):
    with ExitStack() as stack:
        for number in range(80):
            stack.enter_context(begin_upload(apis[number % 2], b"x" * 1000))
        answer = apis[0].request("GET", "/v1/files")
        assert answer.status_code == 200
        began = time.monotonic()
        apis[0].upload(rows())
        assert time.monotonic() - began < 20


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("limit", "of_others"), [("_MAX_TRANSFERS", 429), ("_MAX_TRANSFERS_OF_PROJECT", 200)]
)
def test_uploads_at_a_time_are_limited(
    apis: list[Api], monkeypatch: pytest.MonkeyPatch, limit: str, of_others: int
):
    monkeypatch.setattr(f"service.files.{limit}", 2)
    red, blue = apis
    with ExitStack() as stack:
        while (answer := upload_once(red)).status_code == 200:
            stack.enter_context(begin_upload(red, b"x"))
            time.sleep(0.2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "5"
        red.get("/v1/files")
        assert upload_once(blue).status_code == of_others
    while (answer := upload_once(red)).status_code == 429:
        time.sleep(0.1)
    assert answer.status_code == 200


@pytest.mark.timeout(60)
def test_downloads_at_a_time_are_limited(apis: list[Api], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.files._MAX_TRANSFERS", 2)
    red = apis[0]
    content = b"x" * 30_000_000  # more than the buffers of a connection
    path = f"/v1/files/{red.upload(content)['id']}/content"
    host, port = red.url.removeprefix("http://").split(":")
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {red.key}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        answer = red.request("GET", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "5"
    while (answer := red.request("GET", path)).status_code == 429:
        time.sleep(0.1)
    assert answer.content == content


@pytest.mark.parametrize(
    ("error", "status"), [(NotFoundError("it was deleted"), 404), (BucketError("no answer"), 503)]
)
def test_download_that_cannot_begin_has_an_error_object(
    apis: list[Api], monkeypatch: pytest.MonkeyPatch, error: BucketError, status: int
):
    file = apis[0].upload(rows())["id"]

    def fail(*_: Any) -> bytes:
        raise error

    monkeypatch.setattr(S3Store, "read_range", fail)
    apis[0].get(f"/v1/files/{file}/content", status)


def upload_once(api: Api) -> Any:
    data = {"purpose": "fine-tune"}
    return api.request("POST", "/v1/files", data=data, files={"file": ("a.jsonl", rows())})


def test_silent_upload_is_ended_and_leaves_nothing(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.requests._SILENCE_SECONDS", 0.5)
    with (
        begin_upload(apis[0], b"x" * (UPLOAD_PART_BYTES + 10)) as connection,
        connection.makefile("rb") as file,
    ):
        answer = file.read()  # to the end: the service closes the connection
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"error":{' in answer
    assert store.list("content/") == store.list("projects/") == []
    assert store.abort_stale_uploads() == 0


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/chat/completions"])
def test_cut_and_silent_bodies_are_no_errors_of_the_server(
    apis: list[Api], monkeypatch: pytest.MonkeyPatch, path: str
):
    monkeypatch.setattr("service.requests._SILENCE_SECONDS", 0.5)
    with (
        begin_request(apis[0], path, "application/json", b'{"model": ') as connection,
        connection.makefile("rb") as file,
    ):
        assert file.read().startswith(b"HTTP/1.1 408 ")  # to the end: the service closes the connection
    monkeypatch.setattr("service.requests._SILENCE_SECONDS", 60.0)
    begin_request(apis[0], path, "application/json", b'{"model": ').close()
    wait_until(lambda: 'status="499"' in apis[0].request("GET", "/metrics").text)
    metrics = apis[0].request("GET", "/metrics").text
    assert 'status="408"' in metrics
    assert 'status="5' not in metrics


@pytest.mark.parametrize(
    ("purpose", "content", "param"),
    [("assistants", rows(), "purpose"), ("fine-tune", b"", "file"), (None, rows(), "purpose")],
)
def test_wrong_upload_is_rejected_and_leaves_nothing(
    apis: list[Api], store: S3Store, purpose: str | None, content: bytes, param: str
):
    data = {"purpose": purpose} if purpose else {}
    answer = apis[0].request("POST", "/v1/files", data=data, files={"file": ("a.jsonl", content)})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert store.list("content/") == store.list("projects/") == []


def test_files_above_the_limits_are_rejected(tmp_path: Path, bucket_uri: str):
    limits = {"file_bytes": 1000, "stored_bytes": 1500}
    with running_api(load_service(write_service(tmp_path, bucket_uri, limits=limits))) as (api,):
        api.upload(b"x" * 1001, status=413)
        api.upload(b"x" * 1000)
        api.upload(b"x" * 600)
        answer = api.request("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": b"x"})
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 120


def test_job_reports_resolved_hyperparameters(apis: list[Api]):
    red, blue = apis
    file = red.upload(rows())["id"]
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    job = red.create_job(file, method=method, suffix="my-model", seed=7, metadata={"team": "a"})
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert (job["status"], job["seed"], job["model"]) == ("validating_files", 7, "tiny")
    assert job["user_provided_suffix"] == "my-model"
    old = red.create_job(file, hyperparameters={"n_epochs": 5})
    assert old["hyperparameters"]["n_epochs"] == 5
    dpo = red.create_job(file, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}})
    assert dpo["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    blue.get(f"/v1/fine_tuning/jobs/{job['id']}", 404)
    assert ids(red.get("/v1/fine_tuning/jobs?metadata[team]=a")) == [job["id"]]
    assert ids(red.get("/v1/fine_tuning/jobs?metadata[team]=b")) == []
    assert ids(red.get("/v1/fine_tuning/jobs?metadata=null")) == [dpo["id"], old["id"]]
    assert [event["message"] for event in red.get(f"/v1/fine_tuning/jobs/{job['id']}/events")["data"]] == [
        "Validating training file",
        "Created fine-tuning job",
    ]
    assert red.delete(f"/v1/files/{file}", 400)["error"]["param"] == "file_id"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": "ft:tiny:blue::00"}, 404, "model"),
        ({"training_file": "file-none"}, 400, "training_file"),
        ({"validation_file": "../x"}, 400, "validation_file"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "method.type"),
        (
            {"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 1}}}},
            400,
            "method.supervised",
        ),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"suffix": "a:b"}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"unknown": 1}, 400, "unknown"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "integrations"),
        ({"hyperparameters": {"learning_rate_multiplier": 5e-324}}, 400, "hyperparameters"),
    ],
)
def test_wrong_job_is_rejected_with_its_parameter(
    any_api: Api,
    any_file: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    status: int,
    param: str,
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    body = {"model": "tiny", "training_file": any_file} | changes
    error = any_api.post("/v1/fine_tuning/jobs", body, status)["error"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("wandb", "param"),
    [
        ({"project": "p" * 128, "name": "n" * 128, "tags": ["t" * 64] * 16}, None),
        ({"project": "p" * 129}, "project"),
        ({"project": "a/b"}, "project"),
        ({"project": "p", "name": "n" * 129}, "name"),
        ({"project": "p", "name": ""}, "name"),
        ({"project": "p", "tags": ["t"] * 17}, "tags"),
        ({"project": "p", "tags": ["t" * 65]}, "tags.0"),
        ({"project": "p", "tags": [""]}, "tags.0"),
    ],
)
def test_wandb_settings_have_the_limits_of_wandb(
    any_api: Api, any_file: str, monkeypatch: pytest.MonkeyPatch, wandb: dict[str, Any], param: str | None
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    body = {"model": "tiny", "training_file": any_file}
    body |= {"integrations": [{"type": "wandb", "wandb": wandb}]}
    answer = any_api.post("/v1/fine_tuning/jobs", body, 400 if param else 200)
    if param:
        assert answer["error"]["param"] == f"integrations.0.wandb.{param}"
    else:
        assert answer["integrations"][0]["wandb"]["name"] == "n" * 128


def test_repeated_create_is_one_job(apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.jobs._REPEAT_SECONDS", 60)
    red = apis[0]
    file = red.upload(rows())["id"]
    with ThreadPoolExecutor(6) as pool:
        created = list(pool.map(lambda _: red.create_job(file, suffix="a")["id"], range(6)))
    assert len(set(created)) == 1
    assert red.create_job(file, suffix="b")["id"] != created[0]
    jobs_of(store, "red").update(created[0], lambda job: job | {"created_at": job["created_at"] - 500})
    retry = {"x-stainless-retry-count": "1"}
    assert red.create_job(file, suffix="a", headers=retry)["id"] == created[0]
    assert red.create_job(file, suffix="a")["id"] != created[0]
    assert len(store.list(active_key("red"))) >= 3


def test_repeated_upload_is_one_file(apis: list[Api], store: S3Store):
    red, blue = apis
    content = b"x" * (UPLOAD_PART_BYTES + 10)

    def upload(api: Api = red, content: bytes = content, name: str = "a", *, is_retry: bool = True) -> str:
        headers = {"x-stainless-retry-count": str(int(is_retry))}
        files = {"file": (name, content)}
        form = {"data": {"purpose": "fine-tune"}, "files": files, "headers": headers}
        answer = api.request("POST", "/v1/files", **form)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    first = upload(is_retry=False)
    with ThreadPoolExecutor(3) as pool:
        assert {*pool.map(lambda _: upload(), range(3))} == {first}
    assert len(store.list("content/red")) == 1
    assert red.request("GET", f"/v1/files/{first}/content").content == content
    others = [
        upload(is_retry=False),
        upload(name="b"),
        upload(content=b"y" + content[1:]),
        upload(content=content[:-1] + b"y"),
        upload(Api(red.url, create_key(store, "red"))),
        upload(blue),
    ]
    assert len({first, *others}) == 7
    for file in ids(red.get("/v1/files")):
        files_of(store, "red").update(file, lambda found: found | {"created_at": found["created_at"] - 700})
    assert upload() not in {first, *others}


def test_repeated_upload_that_takes_long_is_one_file(
    apis: list[Api], service: LoadedService, store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    first = apis[0].upload(rows())
    (key,) = list_keys(store, "red")
    form = requests.Request(
        "POST", "http://api", data={"purpose": "fine-tune"}, files={"file": (first["filename"], rows())}
    ).prepare()
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr("service.files.time", SimpleNamespace(time=lambda: clock.now))

    async def receive() -> dict[str, Any]:
        clock.now += RETRY_SECONDS + 100
        return {"type": "http.request", "body": form.body, "more_body": False}

    headers = [(b"content-type", str(form.headers["Content-Type"]).encode())]
    request = Request({"type": "http", "headers": headers}, receive)
    files = Files(store, store, service.config.limits)
    repeated = asyncio.run(files.create(Caller("red", key.id), request, is_retry=True))
    assert repeated["id"] == first["id"]
    assert len(store.list("content/red")) == 1


def upload_again(api: Api, content: bytes) -> Any:
    """Upload a file as OpenAI's client repeats it after a lost response."""
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", content)}}
    return api.request("POST", "/v1/files", headers={"x-stainless-retry-count": "1"}, **form)


def test_repeated_upload_that_used_up_the_limit_is_one_file(tmp_path: Path, bucket_uri: str):
    service = load_service(write_service(tmp_path, bucket_uri, limits={"stored_bytes": 1000}))
    with running_api(service) as (red,):
        first = red.upload(b"x" * 1000)
        assert red.upload(b"x" * 1000, status=429)["error"]["code"] == "insufficient_quota"
        assert upload_again(red, b"x" * 1000).json() == first
        answer = upload_again(red, b"y" * 1000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert ids(red.get("/v1/files")) == [first["id"]]
        assert len(S3Store(service.config.storage_path).list("content/")) == 1
        red.delete(f"/v1/files/{first['id']}")
        assert upload_again(red, b"y" * 1000).status_code == 200


def test_content_of_a_killed_upload_does_not_count(tmp_path: Path, bucket_uri: str):
    service = load_service(write_service(tmp_path, bucket_uri, limits={"stored_bytes": 1000}))
    with running_api(service) as (red,):
        S3Store(service.config.storage_path).write(content_key("red", "killed.jsonl"), b"x" * 1000)
        red.upload(b"x" * 900)
        red.upload(b"x" * 100)
        assert red.upload(b"x", status=429)["error"]["code"] == "insufficient_quota"


def test_repeated_request_is_recognized_among_many_of_its_time(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    red, retry = apis[0], {"x-stainless-retry-count": "1"}
    file = red.upload(rows())
    job = red.create_job(file["id"])
    for records, created in ((files_of(store, "red"), file), (jobs_of(store, "red"), job)):
        template = records.get(created["id"])
        assert template
        prefix = created["id"].partition("-")[0]
        others = template | {"checksum": "none", "request_digest": "none"}
        for number in range(1, 5):
            ids_of_page = [f"{prefix}-{number:07x}{place:04x}{0:013x}" for place in range(1, 41)]
            page = [others | {"id": each} for each in ids_of_page]
            records._write(number, [] if number == 3 else page, None)  # 3: its files were deleted
    assert upload_again(red, rows()).json()["id"] == file["id"]
    assert red.create_job(file["id"], headers=retry)["id"] == job["id"]
    # Older pages are not read.
    read: list[str] = []
    original = S3Store.read_if_exists
    monkeypatch.setattr(S3Store, "read_if_exists", lambda self, key: read.append(key) or original(self, key))
    monkeypatch.setattr("service.files.time", SimpleNamespace(time=lambda: time.time() + RETRY_SECONDS + 60))
    assert upload_again(red, rows()).json()["id"] != file["id"]
    assert not [key for key in read if "/files/" in key]


def test_upload_whose_record_was_stored_by_a_lost_write_is_one_file(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    write, lost = Records._write, [True]

    def lose_first(self: Records, *arguments: Any) -> bool:
        written = write(self, *arguments)
        return written and not (lost and lost.pop())

    monkeypatch.setattr(Records, "_write", lose_first)
    file = apis[0].upload(rows())["id"]
    assert lost == []
    assert ids(apis[0].get("/v1/files")) == [file]
    assert apis[0].request("GET", f"/v1/files/{file}/content").content == rows()


def test_job_status_changes_only_by_allowed_transitions(apis: list[Api], store: S3Store):
    red = apis[0]
    job = red.create_job(red.upload(rows())["id"])["id"]
    path = f"/v1/fine_tuning/jobs/{job}"
    assert "validating_files" in red.post(f"{path}/resume", status=400)["error"]["message"]
    # The client says that an empty body is JSON.
    headers = {"content-type": "application/json"}
    assert red.post(f"{path}/pause", headers=headers)["status"] == "paused"
    assert red.post(f"{path}/pause")["status"] == "paused"
    assert red.post(f"{path}/resume")["status"] == "validating_files"
    assert red.post(f"{path}/cancel")["status"] == "cancelled"
    assert red.post(f"{path}/cancel")["finished_at"] > 0
    assert "cancelled" in red.post(f"{path}/pause", status=400)["error"]["message"]
    assert len(jobs_of(store, "red").get(job)["messages"]) == 5  # pyright: ignore


def test_unfinished_jobs_and_requests_have_limits(
    tmp_path: Path, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.jobs._REPEAT_SECONDS", 60)
    service = load_service(write_service(tmp_path, bucket_uri, limits={"jobs": 1, "requests_per_minute": 5}))
    with running_api(service, ["red", "blue"]) as (red, blue):
        file = red.upload(rows())["id"]
        job = red.create_job(file)
        assert red.create_job(file)["id"] == job["id"]
        answer = red.request(
            "POST", "/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file, "seed": 1}
        )
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 120
        red.get("/v1/models")
        answer = red.request("GET", "/v1/models")
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 120
        blue.get("/v1/models")


def test_only_valid_keys_are_answered(apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch):
    red = apis[0]
    for headers in (
        {"Authorization": ""},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic eA=="},
    ):
        assert red.request("GET", "/v1/models", headers=headers).status_code == 401
    again = Api(red.url, create_key(store, "red"))
    again.get("/v1/models")
    assert [record.revoked_at for record in list_keys(store, "red")] == [None, None]
    revoke_keys(store, "red", None)
    with pytest.raises(KeysError, match="keys list red"):
        revoke_keys(store, "red", None)
    later = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + 2)
    monkeypatch.setattr("service.middleware.time", later)
    again.get("/v1/models", 401)
    assert not any(red.key.encode() in store.read(item.key) for item in store.list())


def test_key_and_prompt_are_in_no_log(apis: list[Api], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "service"):
        apis[0].get(f"/v1/models/secret-{apis[0].key}", 404)
        apis[0].get("/v1/models")  # the line is written after the answer
    lines = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert json.loads(lines[0])["status"] == 404
    assert not any(apis[0].key in line or "secret" in line for line in lines)


def test_health_and_metrics_need_no_key(apis: list[Api]):
    apis[0].create_job(apis[0].upload(rows())["id"])
    assert apis[0].request("GET", "/healthz", headers={"Authorization": ""}).status_code == 200
    text = apis[0].request("GET", "/metrics", headers={"Authorization": ""}).text
    assert 'anneal_jobs{status="validating_files"} 1.0' in text
    assert 'anneal_requests_total{method="POST",route="/v1/fine_tuning/jobs",status="200"} 1.0' in text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/files", 405),
        ("GET", "/v1/files/..%2F..%2Fkeys", 404),
        ("GET", "/v1/fine_tuning/jobs?limit=-1", 400),
        ("GET", "/v1/fine_tuning/jobs?limit=9999999999999", 400),
        ("GET", "/v1/fine_tuning/jobs?after=ftjob-x", 400),
        ("GET", "/v1/models/org%2Fname:x", 404),
        ("POST", "/v1/fine_tuning/jobs", 400),
    ],
)
def test_wrong_request_has_an_error_object(any_api: Api, method: str, path: str, status: int):
    answer = any_api.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", ["[" * 100_000, "{", "[]", '{"model": NaN}', '{"model": "\\ud800"}', f'{{"seed": {"9" * 5000}}}']
)
def test_wrong_json_is_rejected(any_api: Api, body: str):
    answer = any_api.request("POST", "/v1/fine_tuning/jobs", data=body)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def store_records(red: Api, store: S3Store, kind: str, counts: dict[str, int]) -> str:
    """Store so many files or jobs for each project, all like a real one; return the begin of their ids."""
    file = red.upload(rows())["id"]
    records, newest = (files_of, file) if kind == "files" else (jobs_of, red.create_job(file)["id"])
    template = records(store, "red").get(newest)
    assert template
    prefix, directory = newest.partition("-")[0], kind.rpartition("/")[2]
    for project, count in counts.items():
        for number in range(-(-count // 40)):
            page = [
                template
                | {"id": f"{prefix}-{number:07x}{place:04x}{0:013x}", "created_at": 1000 * number + place}
                for place in range(1, min(40, count - 40 * number) + 1)
            ]
            key = f"projects/{project}/{directory}/{999_999_999 - number:09d}.json"
            store.write(key, json.dumps(page).encode())
    return prefix


@pytest.mark.parametrize("kind", ["fine_tuning/jobs", pytest.param("files", marks=pytest.mark.slow)])
def test_records_of_10_000_are_listed_with_few_requests(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch, kind: str
):
    red, blue = apis
    prefix = store_records(red, store, kind, {"blue": 10_000})
    red.get(f"/v1/{kind}")  # both keys are known now
    blue.get(f"/v1/{kind}?limit=1")
    sent = count_requests(monkeypatch)
    pages, after = [], ""
    for _ in range(3):
        sent.clear()
        pages.append(blue.get(f"/v1/{kind}?limit=20{after}"))
        assert len(sent) <= 5
        after = f"&after={pages[-1]['last_id']}"
    assert pages[0]["has_more"]
    listed = [record["created_at"] for page in pages for record in page["data"]]
    newest_first = [1000 * number + place for number in (249, 248) for place in range(40, 0, -1)]
    assert listed == newest_first[:60]
    last = blue.get(f"/v1/{kind}?limit=20&after={prefix}-{0:07x}{20:04x}{0:013x}")
    assert (len(last["data"]), last["has_more"]) == (19, False)


@only_in_test_service
@pytest.mark.parametrize("kind", ["fine_tuning/jobs", "files"])
def test_page_among_10_000_takes_at_most_twice_the_time_of_one_among_100(
    tmp_path: Path, bucket_uri: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    limits = {"requests_per_minute": 10**6}
    service = load_service(write_service(tmp_path, bucket_uri, limits=limits))
    with running_api(service, ["red", "few", "many"]) as (red, few, many):
        store_records(red, S3Store(service.config.storage_path), kind, {"few": 100, "many": 10_000})
        seconds: dict[Api, list[float]] = {few: [], many: []}
        for _ in range(40):
            for api, measured in seconds.items():
                began, after = time.monotonic(), ""
                for _ in range(3):
                    after = f"&after={api.get(f'/v1/{kind}?limit=20{after}')['last_id']}"
                measured.append((time.monotonic() - began) / 3)
    of_few, of_many = (statistics.median(measured) for measured in seconds.values())
    with capsys.disabled():
        print(f"({kind}: ms of a page among 100 and among 10,000: {1000 * of_few:.1f}, {1000 * of_many:.1f})")
    assert of_many <= 2 * of_few


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an item for each request to the bucket."""
    sent: list[int] = []
    original = S3Store._request

    def request(self: S3Store, send: Any) -> Any:
        sent.append(1)
        return original(self, send)

    monkeypatch.setattr(S3Store, "_request", request)
    return sent


def test_events_of_a_running_job_are_read_only_after_a_change(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    red = apis[0]
    job = red.create_job(red.upload(rows())["id"])["id"]
    path = f"/v1/fine_tuning/jobs/{job}/events?limit=100"

    def steps() -> list[int]:
        return [event["data"]["step"] for event in red.get(path)["data"] if event["type"] == "metrics"]

    read: list[str] = []
    original = S3Store.read_version
    monkeypatch.setattr(S3Store, "read_version", lambda self, key: read.append(key) or original(self, key))

    def reads_of_metrics() -> int:
        return sum(key == metrics_key("red", job) for key in read)

    assert steps() == []
    read.clear()
    write_steps(store, job, [1, 2])
    assert [steps(), steps(), steps()] == [[2, 1]] * 3
    assert reads_of_metrics() == 1
    write_steps(store, job, [1, 2, 3])
    assert [steps(), steps()] == [[3, 2, 1]] * 2
    assert reads_of_metrics() == 2
    write_steps(store, job, [1])  # another attempt continues from an earlier checkpoint
    event = red.get(path)["data"][0]
    assert event["data"] == {
        "step": 1,
        "total_steps": None,
        "train_loss": 2.0,
        "train_mean_token_accuracy": 0.25,
    }


def write_steps(store: S3Store, job: str, steps: Sequence[int]) -> None:
    """Write the metrics of a job's run."""
    lines = [{"step": step, "epoch": 1, "loss": 2.0, "mean_token_accuracy": 0.25} for step in steps]
    store.write(metrics_key("red", job), "".join(json.dumps(line) + "\n" for line in lines).encode())


def test_page_of_events_builds_only_its_events(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    red = apis[0]
    job = red.create_job(red.upload(rows())["id"])["id"]
    write_steps(store, job, range(1, 301))

    def run(found: Record) -> Record:
        now = found["created_at"]
        messages = [*found["messages"], [now + 15, "info", "between", 2], [now + 20, "info", "last", 3]]
        return found | {"messages": messages, "marks": [[100, now + 10], [200, now + 20], [300, now + 30]]}

    jobs_of(store, "red").update(job, run)
    built: list[int] = []
    build = progress._metrics_event
    monkeypatch.setattr(progress, "_metrics_event", lambda *args: built.append(1) or build(*args))
    path = f"/v1/fine_tuning/jobs/{job}/events"
    assert len(red.get(path)["data"]) == len(built) == 20
    listed: dict[str, list[Any]] = {}
    for order in ("desc", "asc"):
        listed[order] = []
        after, has_more = "", True
        while has_more:
            page = red.get(f"{path}?limit=100&order={order}{after}")
            listed[order] += page["data"]
            after, has_more = f"&after={page['last_id']}", page["has_more"]
    assert listed["asc"] == listed["desc"][::-1]
    assert listed["asc"] == sorted(listed["asc"], key=lambda event: (event["created_at"], event["id"]))
    steps = [event["data"]["step"] for event in listed["asc"] if event["type"] == "metrics"]
    assert steps == list(range(1, 301))
    texts = [event["message"] for event in listed["asc"]]
    assert texts.index("between") == 102  # after the messages of the start and the first mark
    assert len(texts) == 304
    assert red.get(f"{path}?after=ftevent-none", 400)["error"]["param"] == "after"


def test_metrics_are_read_once_for_all_clients_that_poll(
    apis: list[Api], store: S3Store, monkeypatch: pytest.MonkeyPatch
):
    red = apis[0]
    job = red.create_job(red.upload(rows())["id"])["id"]
    write_steps(store, job, [1])
    read: list[str] = []
    original = S3Store.read_version

    def slow_read(self: S3Store, key: str) -> Any:
        if key == metrics_key("red", job):
            read.append(key)
            time.sleep(0.3)
        return original(self, key)

    monkeypatch.setattr(S3Store, "read_version", slow_read)
    with ThreadPoolExecutor(8) as pool:
        counts = list(
            pool.map(lambda _: len(red.get(f"/v1/fine_tuning/jobs/{job}/events")["data"]), range(8))
        )
    assert counts == [3] * 8
    assert len(read) == 1


def test_metrics_of_long_runs_leave_memory(store: S3Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_MAX_STEPS", 100)
    known = progress.Progress(store)
    for name, count in (("a", 60), ("b", 60), ("c", 500), ("d", 10)):
        write_steps(store, name, range(count))
        assert len(known.steps("red", name)) == count
    assert [len(steps) for _, steps in known._known.values()] == [10]


def test_after_a_deleted_record_the_list_continues(apis: list[Api], store: S3Store):
    red = apis[0]
    created = [red.upload(rows())["id"] for _ in range(5)]
    newest_first = created[::-1]
    first = red.get("/v1/files?limit=2")
    assert (ids(first), first["has_more"]) == (newest_first[:2], True)
    red.delete(f"/v1/files/{newest_first[1]}")
    assert ids(red.get(f"/v1/files?limit=2&after={newest_first[1]}")) == newest_first[2:4]
    assert ids(red.get(f"/v1/files?order=asc&after={created[0]}")) == [created[1], created[2], created[4]]


def test_writes_at_the_same_moment_lose_nothing(store: S3Store):
    records = files_of(store, "red")

    def add(number: int) -> str:
        return records.append(lambda identifier: {"id": identifier, "n": number, "seen": 0})["id"]

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(add, range(45)))
        again = list(pool.map(lambda each: records.update(each, lambda found: found | {"seen": 1}), created))
    assert len(set(created)) == 45
    found = records.slice(after=None, limit=100)
    assert found
    assert sorted(record["n"] for record in found.records) == list(range(45))
    assert all(record and record["seen"] == 1 for record in again)
    assert all(record["seen"] == 1 for record in found.records)
