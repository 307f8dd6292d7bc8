"""How failures are classified and reported."""

import signal

import pytest
import ray.exceptions
import ray.train
import torch

from tests.support.messages import assert_names
from training.job import _ending, _how_lost, classify
from training.memory import Saving
from training.worker_groups import causes_of


def as_ray_raises_it(cause: Exception) -> ray.train.WorkerGroupError:
    """A worker's failure, as fit() raises it."""
    return ray.train.WorkerGroupError("Training failed due to worker errors", {1: cause})


def reason_of(cause: Exception) -> str:
    return classify(causes_of(as_ray_raises_it(cause)), [])


def test_a_failure_after_a_signal_is_part_of_the_reason():
    assert _ending(None, [signal.SIGTERM], False).reason == "SIGTERM"
    failure = "s3://b/run: AccessDenied"
    ending = _ending(failure, [signal.SIGTERM], False)
    assert (ending.status, ending.stop_signal) == ("stopped", signal.SIGTERM)
    assert_names(ending.reason, "SIGTERM", failure)


def test_an_allocation_error_of_torch_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    reason = reason_of(caught.value)
    assert reason.startswith("out of memory: ")
    assert "\n" not in reason


def test_a_worker_killed_by_rays_memory_monitor_is_out_of_memory():
    words = "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB.\nTop 10 memory users: …"
    reason = reason_of(ray.exceptions.OutOfMemoryError(words))
    assert reason == "out of memory: Task was killed due to the node running low on memory."


def test_a_dead_worker_is_worker_lost():
    reason = reason_of(ray.exceptions.ActorDiedError())
    assert reason.startswith("worker lost: ")


def test_actors_killed_by_rays_memory_monitor_are_out_of_memory():
    words = "6 worker(s) were killed due to the node running low on memory. Memory on the node was 23.1GB / 24.0GB"
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30)]
    reason = _how_lost(ray.exceptions.OutOfMemoryError(words), savings)
    assert reason.startswith(f"out of memory: {words}. ")
    assert_names(reason, "`gradient_checkpointing: true` (5.0 GiB")


def test_a_dead_controller_is_a_lost_cluster():
    assert_names(_how_lost(ray.exceptions.ActorDiedError(), []), "cluster", "lost", "The actor died ")


def test_an_error_of_the_workers_own():
    error = ValueError("row 3: no")
    assert reason_of(error) == "row 3: no"


def test_an_out_of_memory_error_is_followed_by_what_would_save_memory():
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB.\nSee documentation."
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30), Saving("optim: adamw_8bit", 3 * 2**29)]
    reason = classify(causes_of(as_ray_raises_it(torch.OutOfMemoryError(words))), savings)
    assert reason.startswith(f"out of memory: {words.splitlines()[0]}")
    assert "See documentation" not in reason
    assert_names(reason, "`gradient_checkpointing: true` (5.0 GiB", "`optim: adamw_8bit` (1.5 GiB")
