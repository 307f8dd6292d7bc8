"""The start of the service: errors and warnings before it is ready, without a cluster."""

import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RpcError
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus
from rich.console import Console

from service.app import APP_NAME
from service.commands import ServiceError, _check_http_options, _Run
from service.config import load_service
from service.engine import engine_deployment
from tests.support.jobs import PROJECT
from tests.support.ports import free_port
from tests.support.service import write_service
from training.loop import ray_internals
from training.planning.endpoints import ClusterTarget

DEPLOYING, FAILED, RUNNING = (
    ServeStatus(applications={APP_NAME: ApplicationStatusOverview(status, "no such model", 0.0, {})})
    for status in (
        ApplicationStatus.DEPLOYING,
        ApplicationStatus.DEPLOY_FAILED,
        ApplicationStatus.RUNNING,
    )
)


def start(
    tmp_path: Path, port: int = 8000, *, cluster: str | None = None, **keys: Any
) -> tuple[_Run, io.StringIO]:
    """Return a start of the service that has not begun, and the text that it prints."""
    printed = io.StringIO()
    console = Console(file=printed)
    service = load_service(write_service(tmp_path, "s3://bucket/service", **keys), port)
    return _Run(service, ClusterTarget(cluster), console, console, as_json=False), printed


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Serve accept every application without a cluster."""
    for name in ("start", "run_many"):
        monkeypatch.setattr(serve, name, lambda *_, **__: None)
    values: dict[str, str] = {}
    monkeypatch.setattr(ray_internals, "set_cluster_value", values.__setitem__)
    monkeypatch.setattr(ray_internals, "cluster_value", values.get)


def engine_with(**resources: Any) -> dict[str, Any]:
    return {"tiny": {"config": "base.yaml", "resources": resources}}


@pytest.mark.slow
def test_only_engines_and_checks_import_torch():
    """The process that starts the service, its other replicas and the drivers need seconds less."""
    code = "import sys, service.app, service.drivers, service.scheduler; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_engine_reserves_memory(tmp_path: Path):
    run, _ = start(tmp_path, models=engine_with(memory="16GiB", licence=1))
    service = run._service
    engine: Any = engine_deployment("tiny", service.config.models["tiny"], service.bases["tiny"].config)
    options = engine._bound_deployment.ray_actor_options
    assert (options["memory"], options["resources"]) == (16 * 2**30, {"licence": 1})


@pytest.mark.usefixtures("deployed")
def test_resources_that_ray_rejects_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "status", ServeStatus)
    run, _ = start(tmp_path, models=engine_with(object_store_memory=1))
    with pytest.raises(ServiceError, match="object_store_memory"):
        run._deploy()
    assert not run._ownership.is_mine()


@pytest.mark.usefixtures("deployed")
def test_application_that_another_process_deletes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serve, "status", ServeStatus)
    run, _ = start(tmp_path)
    with pytest.raises(ServiceError, match=f"deleted the application {APP_NAME}"):
        run._deploy()


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("already_runs", [True, False])
def test_failed_start_removes_only_its_own_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already_runs: bool
):
    statuses = iter([FAILED if already_runs else ServeStatus(), FAILED])
    monkeypatch.setattr(serve, "status", lambda: next(statuses))
    run, _ = start(tmp_path)
    with pytest.raises(ServiceError, match="no such model"):
        run._deploy()
    assert run._ownership.is_mine() is not already_runs


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize(
    ("replacement", "owner"),
    [("runs", "second"), ("fails", "first"), ("is interrupted", "first")],
)
def test_service_belongs_to_the_last_process_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacement: str, owner: str
):
    first, second = start(tmp_path)[0], start(tmp_path)[0]
    statuses = iter([ServeStatus(), RUNNING, RUNNING, FAILED if replacement == "fails" else RUNNING])
    monkeypatch.setattr(serve, "status", lambda: next(statuses))
    first._deploy()
    if replacement == "is interrupted":
        second._stop.set()
    with pytest.raises(ServiceError) if replacement == "fails" else nullcontext():
        second._deploy()
    owners = {"first": first._ownership.is_mine(), "second": second._ownership.is_mine()}
    assert owners == {"first": owner == "first", "second": owner == "second"}


@pytest.mark.usefixtures("deployed")
def test_service_belongs_to_the_process_that_replaced_it_while_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = start(tmp_path)[0], start(tmp_path)[0]
    statuses = iter([ServeStatus(), DEPLOYING, RUNNING, RUNNING, RUNNING])

    def status() -> ServeStatus:
        found = next(statuses)
        if found is DEPLOYING:
            second._deploy()
        return found

    monkeypatch.setattr(serve, "status", status)
    first._deploy()
    assert (first._ownership.is_mine(), second._ownership.is_mine()) == (False, True)


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("replacement", ["runs", "fails", "is interrupted"])
def test_process_that_stops_passes_its_service_to_the_one_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacement: str
):
    first, second = start(tmp_path)[0], start(tmp_path)[0]
    end = FAILED if replacement == "fails" else RUNNING
    statuses = iter([ServeStatus(), RUNNING, RUNNING, DEPLOYING, DEPLOYING, end])
    asked = []

    def status() -> ServeStatus:
        asked.append(1)
        if len(asked) == 5:
            assert not first._ownership.leave()
            if replacement == "is interrupted":
                second._stop.set()
        return next(statuses)

    monkeypatch.setattr(serve, "status", status)
    first._deploy()
    with pytest.raises(ServiceError) if replacement == "fails" else nullcontext():
        second._deploy()
    assert second._ownership.leave()
    assert not first._ownership.is_mine()


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("replacement", ["was killed", "has stopped", "stops at the same moment"])
def test_service_is_not_passed_to_a_process_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacement: str
):
    first, second = start(tmp_path)[0]._ownership, start(tmp_path)[0]._ownership
    first.take()
    second.claim()
    if replacement == "was killed":
        later = time.time() + 121
        monkeypatch.setattr("service.ownership.time", SimpleNamespace(time=lambda: later))
    elif replacement == "has stopped":
        assert not second.leave()
    else:
        store = ray_internals.set_cluster_value

        def stop_second(name: str, value: str) -> None:
            monkeypatch.setattr(ray_internals, "set_cluster_value", store)
            assert not second.leave()
            store(name, value)

        monkeypatch.setattr(ray_internals, "set_cluster_value", stop_second)
    assert first.leave()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("deployed")
def test_process_exits_once_another_has_replaced_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.commands._OWNER_SECONDS", 0.01)
    (first, printed), (second, _) = start(tmp_path), start(tmp_path)
    first._ownership.take()
    value, asked = ray_internals.cluster_value, []

    def restarting_head(name: str) -> str | None:
        asked.append(1)
        if len(asked) == 2:
            raise RpcError("the GCS does not answer")
        if len(asked) == 4:
            second._ownership.take()
        return value(name)

    monkeypatch.setattr(ray_internals, "cluster_value", restarting_head)
    first._wait_for_end()
    assert len(asked) == 4
    assert "another process has replaced the service" in printed.getvalue()


@pytest.mark.usefixtures("deployed")
def test_update_that_is_interrupted_before_the_service_answers_owns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serve, "status", lambda: RUNNING)
    with answering(503) as port:
        update, _ = start(tmp_path, port, cluster="ray://head:10001")
        threading.Timer(0.5, update._stop.set).start()
        update._deploy()
    assert not update._ownership.is_mine()


@pytest.mark.parametrize(
    ("location", "host", "port", "error"),
    [
        ("EveryNode", "127.0.0.1", 8000, None),
        ("EveryNode", "0.0.0.0", 8000, "at host: 0.0.0.0, port: 8000"),
        ("HeadOnly", "127.0.0.1", 8001, "at host: 127.0.0.1, port: 8001"),
        ("Disabled", "127.0.0.1", 8000, "without proxies"),
    ],
)
def test_running_serve_must_listen_at_the_address(
    tmp_path: Path, location: str, host: str, port: int, error: str | None
):
    options = HTTPOptions(host=host, port=port)
    running = SimpleNamespace(http_config=options, get_serve_details=lambda: {"proxy_location": location})
    config = start(tmp_path)[0]._service.config
    if error is None:
        _check_http_options(config, running)
    else:
        with pytest.raises(ServiceError, match=f"port: 8000: Serve already runs on the cluster {error}"):
            _check_http_options(config, running)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer every request with this status; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_bucket_that_does_not_answer_the_service_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.commands._ANSWER_SECONDS", 0.1)
    with answering(503) as port:
        run, _ = start(tmp_path, port)
        with pytest.raises(ServiceError, match="s3://bucket/service: the bucket does not answer"):
            run._wait_for_answer()


def test_machine_without_a_proxy_prints_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.commands._ANSWER_SECONDS", 0.1)
    port = free_port()
    run, printed = start(tmp_path, port)
    run._wait_for_answer()
    assert f"warning: the service does not answer at host: 127.0.0.1, port: {port}" in printed.getvalue()
    with answering(200) as port:
        run, printed = start(tmp_path, port)
        run._wait_for_answer()
    assert printed.getvalue() == ""
