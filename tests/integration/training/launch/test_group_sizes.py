"""Elastic runs start the largest allowed worker group that fits a real Ray cluster."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from training.events import EventMailbox
from training.launch.elastic import GroupSizes
from training.loop.ray_internals import NoopDecision, ResizeDecision, ScalingDecision

pytestmark = pytest.mark.slow

COUNTS = (2, 6)
"""Worker counts that divide a step evenly; Ray's own policy would accept any count in the range."""
CPUS = 9


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Any]:
    ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield ray.remote(EventMailbox).options(num_cpus=0).remote()
    ray.shutdown()


def initial_decision(mailbox: Any, cpus_per_worker: int) -> ScalingDecision:
    """Register the policy with Ray and return its decision for a new worker group."""
    scaling = ScalingConfig(num_workers=COUNTS, resources_per_worker={"CPU": cpus_per_worker})
    sizes = GroupSizes(scaling, COUNTS, mailbox)
    context: Any = SimpleNamespace(run_id=f"{cpus_per_worker}-cpus")
    sizes.after_controller_start(context)
    try:
        return sizes.make_decision_for_non_running_worker_group()
    finally:
        sizes.before_controller_abort()


@pytest.mark.parametrize(("cpus_per_worker", "workers"), [(1, 6), (2, 2), (3, 2), (4, 2)])
def test_worker_group_starts_with_the_largest_allowed_count_that_fits(
    mailbox: Any, cpus_per_worker: int, workers: int
):
    decision = initial_decision(mailbox, cpus_per_worker)
    assert isinstance(decision, ResizeDecision)
    assert (decision.num_workers, decision.resources_per_worker) == (workers, {"CPU": cpus_per_worker})


def test_worker_group_waits_while_the_minimum_worker_count_does_not_fit(mailbox: Any):
    assert initial_decision(mailbox, 5) == NoopDecision()
