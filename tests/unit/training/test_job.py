"""What a failed run says about why."""

import signal

import pytest
import ray.exceptions
import ray.train
import torch

from training.job import _ending, _how_lost, classify
from training.memory import Saving
from training.worker_groups import causes_of


def as_ray_tells_it(cause: Exception) -> ray.train.WorkerGroupError:
    """A worker's failure, as fit() raises it."""
    return ray.train.WorkerGroupError("Training failed due to worker errors", {1: cause})


def reason_of(cause: Exception) -> str:
    return classify(causes_of(as_ray_tells_it(cause)), [])


def test_a_signal_does_not_hide_what_went_wrong_before_the_run_could_stop():
    assert _ending(None, [signal.SIGTERM], False).reason == "SIGTERM"
    refused = "s3://b/run: AccessDenied"
    ending = _ending(refused, [signal.SIGTERM], False)
    assert (ending.status, ending.stop_signal) == ("stopped", signal.SIGTERM)
    assert ending.reason == f"SIGTERM; before it could stop: {refused}"


def test_torch_without_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    reason = reason_of(caught.value)
    assert reason.startswith("out of memory: ")
    assert "\n" not in reason


def test_a_worker_that_ray_ended_for_its_memory():
    words = "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB.\nTop 10 memory users: …"
    reason = reason_of(ray.exceptions.OutOfMemoryError(words))
    assert reason == "out of memory: Task was killed due to the node running low on memory."


def test_a_worker_that_is_gone():
    reason = reason_of(ray.exceptions.ActorDiedError())
    assert reason.startswith("worker lost: ")


def test_a_run_whose_own_actors_ray_ended_for_memory():
    words = "6 worker(s) were killed due to the node running low on memory. Memory on the node was 23.1GB / 24.0GB"
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30)]
    assert _how_lost(ray.exceptions.OutOfMemoryError(words), savings) == (
        f"out of memory: {words}. What would help most, estimated for each device: `gradient_checkpointing: true` (5.0 GiB less)."
    )


def test_a_cluster_that_is_gone():
    assert _how_lost(ray.exceptions.ActorDiedError(), []).startswith("the cluster was lost (The actor died ")


def test_an_error_of_the_workers_own():
    error = ValueError("row 3: no")
    assert reason_of(error) == "row 3: no"


def test_what_would_save_memory_stands_behind_the_reason():
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB.\nSee documentation."
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30), Saving("optim: adamw_8bit", 3 * 2**29)]
    reason = classify(causes_of(as_ray_tells_it(torch.OutOfMemoryError(words))), savings)
    assert reason == (
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB. What would help most, "
        "estimated for each device: `gradient_checkpointing: true` (5.0 GiB less); `optim: adamw_8bit` (1.5 GiB less)."
    )
