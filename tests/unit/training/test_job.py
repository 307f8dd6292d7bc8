"""What a failed run says about why."""

import pytest
import ray.exceptions
import ray.train
import torch

from training.job import classify


def as_ray_tells_it(cause: Exception) -> ray.train.WorkerGroupError:
    """A worker's failure, as fit() raises it."""
    return ray.train.WorkerGroupError("Training failed due to worker errors", {1: cause})


def test_torch_without_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    reason = classify(as_ray_tells_it(caught.value))
    assert reason.startswith("out of memory: ")
    assert "\n" not in reason


def test_a_worker_that_ray_ended_for_its_memory():
    words = "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB.\nTop 10 memory users: …"
    reason = classify(as_ray_tells_it(ray.exceptions.OutOfMemoryError(words)))
    assert reason == "out of memory: Task was killed due to the node running low on memory."


def test_a_worker_that_is_gone():
    reason = classify(as_ray_tells_it(ray.exceptions.ActorDiedError()))
    assert reason.startswith("worker lost: ")


def test_an_error_of_the_workers_own():
    error = ValueError("row 3: no")
    assert classify(as_ray_tells_it(error)) == "row 3: no"
