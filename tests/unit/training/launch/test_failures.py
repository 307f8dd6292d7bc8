"""Classification of worker failures, and the reported reasons."""

import signal

import pytest
import ray.exceptions
import ray.train
import torch

from tests.support.messages import assert_names
from training.launch.failures import classify_failures, describe_failure, describe_lost_cluster
from training.launch.results import ending_of
from training.loop.ray_internals import WorkerHealthCheckFailedError
from training.planning.memory import Saving


def worker_group_error(cause: Exception) -> ray.train.WorkerGroupError:
    """Return a worker's failure as TorchTrainer.fit() raises it."""
    return ray.train.WorkerGroupError("Training failed due to worker errors", {1: cause})


def reason_of(cause: Exception) -> str:
    return describe_failure(classify_failures(worker_group_error(cause)), [])


def test_reason_of_a_stopped_run_includes_the_signal_and_the_failure():
    assert ending_of(None, [signal.SIGTERM], False).reason == "SIGTERM"
    asked = ending_of(None, [signal.SIGTERM], False, stopped_by="ada@gpu-1")
    assert (asked.reason, asked.stop_signal) == ("by ada@gpu-1 with main.py stop", signal.SIGTERM)
    failure = "s3://b/run: AccessDenied"
    ending = ending_of(failure, [signal.SIGTERM], False)
    assert (ending.status, ending.stop_signal) == ("stopped", signal.SIGTERM)
    assert_names(ending.reason, "SIGTERM", failure)


def test_cpu_allocation_error_of_torch_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    reason = reason_of(caught.value)
    assert reason.startswith("out of memory: ")
    assert "\n" not in reason


def test_worker_killed_by_rays_memory_monitor_is_out_of_memory():
    message = "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB.\nTop 10 memory users: …"
    reason = reason_of(ray.exceptions.OutOfMemoryError(message))
    assert reason == "out of memory: Task was killed due to the node running low on memory."


def test_dead_actor_is_a_lost_worker():
    reason = reason_of(ray.exceptions.ActorDiedError())
    assert reason.startswith("worker lost: ")


def test_reason_of_a_lost_worker_has_no_guesses_of_ray():
    detail = "Worker unexpectedly exits with a connection error code 2. End of file."
    guesses = "Some common causes include: (1) the process was killed by the OOM killer, (2) ray stop --force was called."
    reason = reason_of(
        ray.exceptions.RayActorError(error_msg=f"The actor died.\n\tactor_id: 1\n{detail} {guesses}")
    )
    assert reason == f"worker lost: {detail}"


def test_cluster_lost_to_rays_memory_monitor_is_out_of_memory():
    message = "6 worker(s) were killed due to the node running low on memory. Memory on the node was 23.1GB / 24.0GB"
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30)]
    reason = describe_lost_cluster(ray.exceptions.OutOfMemoryError(message), savings)
    assert reason.startswith(f"out of memory: {message}. ")
    assert_names(reason, "`gradient_checkpointing: true` (5.0 GiB")


def test_dead_controller_is_a_lost_cluster():
    assert_names(
        describe_lost_cluster(ray.exceptions.ActorDiedError(), []), "cluster", "lost", "The actor died "
    )


def test_other_worker_error_is_reported_unchanged():
    error = ValueError("row 3: no")
    assert reason_of(error) == "row 3: no"


def test_out_of_memory_reason_lists_memory_savings():
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB.\nSee documentation."
    savings = [Saving("gradient_checkpointing: true", 5 * 2**30), Saving("optim: adamw_8bit", 3 * 2**29)]
    reason = describe_failure(classify_failures(worker_group_error(torch.OutOfMemoryError(message))), savings)
    assert reason.startswith(f"out of memory: {message.splitlines()[0]}")
    assert "See documentation" not in reason
    assert_names(reason, "`gradient_checkpointing: true` (5.0 GiB", "`optim: adamw_8bit` (1.5 GiB")


@pytest.mark.parametrize(
    "text",
    [
        "row 3: the patient died",
        "exit SYSTEM_ERROR",
        "the service is unavailable",
        "row 3: CUDA out of memory",
    ],
)
def test_user_error_worded_like_a_lost_worker_or_out_of_memory_is_reported_unchanged(text: str):
    assert reason_of(ValueError(text)) == text


def test_lost_worker_takes_precedence_over_errors_of_other_workers():
    """When one worker is lost, the collectives of the others fail."""
    failures = {0: RuntimeError("Connection closed by peer"), 1: ray.exceptions.ActorDiedError()}
    error = ray.train.WorkerGroupError("Training failed due to worker errors", failures)
    assert describe_failure(classify_failures(error), []).startswith("worker lost: ")


@pytest.mark.parametrize("lost_rank", [0, 1])
def test_out_of_memory_takes_precedence_over_a_lost_worker(lost_rank: int):
    """When a worker runs out of memory, others may be lost."""
    failures = {
        lost_rank: ray.exceptions.ActorDiedError(),
        1 - lost_rank: torch.OutOfMemoryError("CUDA out of memory."),
    }
    error = ray.train.WorkerGroupError("Training failed due to worker errors", dict(sorted(failures.items())))
    assert describe_failure(classify_failures(error), []) == "out of memory: CUDA out of memory."


def test_worker_that_fails_its_health_check_is_lost():
    """Ray raises this error when a running worker's actor dies."""
    reason = reason_of(
        WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())
    )
    assert reason == f"worker lost: {ray.exceptions.ActorDiedError.BASE_ERROR_MSG}"


def test_actor_that_ray_killed_for_memory_is_out_of_memory():
    """Ray 2.60 names the cause only in the message of an error of another type."""
    died = ray.exceptions.RayActorError(
        error_msg="The actor died unexpectedly before finishing this task.\n\tpid: 7\n"
        "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB."
    )
    reason = reason_of(WorkerHealthCheckFailedError("A worker health check failed.", died))
    assert reason == "out of memory: Task was killed due to the node running low on memory."


def test_memory_error_of_python_is_out_of_memory():
    assert reason_of(MemoryError()) == "out of memory: MemoryError."


def test_controller_error_is_classified_by_the_error_that_it_wraps():
    error = ray.train.ControllerError(ray.exceptions.NodeDiedError("node 7 is gone"))
    assert describe_failure(classify_failures(error), []) == "worker lost: node 7 is gone"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (KeyError("died"), "KeyError: 'died'"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: CUDA out of memory."),
    ],
)
def test_error_of_an_evaluation_is_classified_by_its_cause(cause: Exception, reason: str):
    """Ray raises an actor method's error as a subclass of RayTaskError and of the cause's type."""
    error = ray.exceptions.RayTaskError("answer", f"Traceback\n{cause!r}", cause, "title", 1, "127.0.0.1")
    assert describe_failure(classify_failures(error.as_instanceof_cause()), []) == reason


def test_collective_whose_peer_is_lost_is_a_lost_worker():
    error = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5855. Check the logs."
    )
    (cause,) = classify_failures(error)
    assert cause.kind == "worker lost"
    assert "node" in cause.line
