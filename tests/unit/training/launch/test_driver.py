"""The driver's record of an attempt."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.events import StepDone, WorkersStarted, WorkersWaiting
from training.launch.driver import RunState, _leaves_at_once, _worker_logs
from training.planning.endpoints import ClusterTarget


def logs_of(directory: Path, address: str | None, *sizes: int) -> list[str]:
    """Return the names of the workers' logs after groups of these sizes, on a cluster of at most three workers."""
    workers: Any = SimpleNamespace(count=3)
    state = RunState(workers, [], lambda _: None)
    for size in sizes:
        state.on_event(WorkersWaiting())
        state.on_event(WorkersStarted(size))
    state.on_event(WorkersWaiting())
    plan: Any = SimpleNamespace(
        scratch=str(directory),
        run_name="a",
        config=SimpleNamespace(most_devices=3),
        resolved=SimpleNamespace(target=ClusterTarget(address)),
    )
    return [log.name for log in _worker_logs(plan, state.most_workers)]


def test_existing_logs_of_local_workers_are_listed(tmp_path: Path):
    assert logs_of(tmp_path, None) == []
    (tmp_path / "logs" / "a").mkdir(parents=True)
    (tmp_path / "logs" / "a" / "worker-1.log").touch()
    assert logs_of(tmp_path, None, 3) == ["worker-1.log"]


@pytest.mark.parametrize(("sizes", "logs"), [((), 0), ((3,), 3), ((1, 2, 1), 2)])
def test_logs_of_workers_that_a_cluster_started_are_listed(tmp_path: Path, sizes: tuple[int, ...], logs: int):
    """This machine cannot know which files exist on others."""
    assert logs_of(tmp_path, "head:6379", *sizes) == [f"worker-{rank}.log" for rank in range(logs)]


def test_step_is_committed_although_the_controller_has_not_said_that_workers_started():
    """Workers and controller send their events by themselves; seen on a busy machine."""
    workers: Any = SimpleNamespace(count=1)
    state = RunState(workers, [], lambda _: None)
    state.on_event(WorkersWaiting())
    assert _leaves_at_once([signal.SIGHUP], state, has_asked=False)
    state.on_event(StepDone(1, 10, 0.1, 1.0, 1.0, None, 0, {}))
    assert not _leaves_at_once([signal.SIGHUP], state, has_asked=False)
