"""The driver's record of an attempt."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.events import WorkersStarted, WorkersWaiting
from training.launch.driver import RunState, _worker_logs
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
