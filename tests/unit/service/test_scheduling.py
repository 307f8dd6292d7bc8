"""Which jobs may start, and what the others wait for."""

import io
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.loading import ConfigError
from service import scheduler
from service.commands import ServiceError, _check_deepspeed, serve_command, warn_about_address
from service.config import load_service
from service.drivers import Needs
from service.job_config import JobConfigError
from service.jobs import with_message
from tests.support.service import write_service

TWO_CPUS = Needs({"CPU": 1.0}, 2)


def free_resources(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has: dict[str, float],
    most: dict[str, float] | None = None,
    taken: dict[str, float] | None = None,
    *,
    grows: bool = False,
) -> scheduler._FreeResources:
    """Return what is free in a cluster with these resources; the engine of the service takes one CPU."""
    monkeypatch.setattr(scheduler.ray, "cluster_resources", lambda: has)
    monkeypatch.setattr(scheduler, "autoscaler_maximum", lambda: most or {})
    monkeypatch.setattr(scheduler, "has_node_groups", lambda: grows)
    return scheduler._FreeResources(load_service(write_service(tmp_path, "s3://bucket/service")), taken or {})


def test_job_starts_when_its_resources_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = free_resources(tmp_path, monkeypatch, {"CPU": 5.0}, taken={"CPU": 2.0})
    assert found.lacking("a", TWO_CPUS) == ""
    found.take(TWO_CPUS)
    assert found.lacking("b", TWO_CPUS) == "CPU 2 (0 of 5 free)"


def test_smaller_job_does_not_overtake_a_waiting_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = free_resources(tmp_path, monkeypatch, {"CPU": 3.0}, taken={"CPU": 1.0})
    assert found.lacking("a", TWO_CPUS) == "CPU 2 (1 of 3 free)"
    assert "a is before it" in found.lacking("b", Needs({"CPU": 1.0}, 1))


def test_job_larger_than_the_cluster_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = free_resources(tmp_path, monkeypatch, {"CPU": 3.0})
    assert found.lacking("a", Needs({"CPU": 1.0, "GPU": 1.0}, 1)) == "GPU 1 (0 of 0 free)"
    assert found.lacking("b", TWO_CPUS) == ""


@pytest.mark.parametrize(("most", "grows"), [({"CPU": 9.0, "GPU": 8.0}, True), ({}, True)])
def test_job_starts_if_the_cluster_can_scale_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: dict[str, float], grows: bool
):
    found = free_resources(tmp_path, monkeypatch, {"CPU": 1.0}, most, grows=grows)
    assert found.lacking("a", Needs({"CPU": 1.0, "GPU": 1.0}, 4)) == ""


def test_events_of_a_job_have_a_limit():
    job = {"messages": [[0, "info", "Created", 0], [0, "info", "Validating", 1]]}
    for number in range(500):
        job = with_message(job, str(number))
    assert [(text, number) for _, _, text, number in job["messages"][1:3]] == [
        ("Validating", 1),
        ("300", 302),
    ]


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("example.org", True)],
)
def test_address_that_others_reach_is_warned_about(host: str, warns: bool):
    text = io.StringIO()
    warn_about_address(host, Console(file=text))
    assert ("TLS" in text.getvalue()) is warns


def test_port_in_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("service.commands.open_consoles", lambda: (Console(quiet=True), Console(quiet=True)))
    path = write_service(tmp_path, "s3://bucket/service")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"{port}.*--port"):
            serve_command(path, port, dry_run=False, as_json=False)


def test_deepspeed_file_of_this_machine_is_an_error_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    path = write_service(tmp_path, "s3://bucket/service", base={"deepspeed": {"config_path": "zero.json"}})
    with pytest.raises(
        ServiceError, match=r"models\.tiny\.config: deepspeed\.config_path: .*zero\.json.*preset"
    ):
        serve_command(path, None, dry_run=True, as_json=False)


def test_deepspeed_file_with_an_absolute_path_is_accepted_on_a_cluster(tmp_path: Path):
    base = {"deepspeed": {"config_path": "/shared/zero.json"}}
    _check_deepspeed(load_service(write_service(tmp_path, "s3://bucket/service", base=base)))


def test_missing_service_yaml_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_service(tmp_path / "none.yaml")


def test_job_whose_config_is_invalid_does_not_stop_the_round(monkeypatch: pytest.MonkeyPatch):
    failed: list[tuple[Any, ...]] = []
    jobs = [("p", {"id": name, "created_at": 0, "needs": None}) for name in ("a", "b")]
    acted: list[str] = []

    def act(project: str, job: Any, driver: Any, free: Any) -> None:
        acted.append(job["id"])
        if job["id"] == "a":
            raise JobConfigError("learning_rate: too small")

    target = scheduler.Scheduler.__new__(scheduler.Scheduler)
    monkeypatch.setattr(scheduler, "find_driver", lambda job_id: None)
    monkeypatch.setattr(scheduler, "_FreeResources", lambda *_: None)
    monkeypatch.setattr(target, "_service", None, raising=False)
    monkeypatch.setattr(target, "_active_jobs", lambda: jobs)
    monkeypatch.setattr(target, "_act", act)
    monkeypatch.setattr(
        target, "_fail", lambda project, job, code, message: failed.append((job["id"], message))
    )
    target.round()
    assert acted == ["a", "b"]
    assert failed == [("a", "learning_rate: too small")]
