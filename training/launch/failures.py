"""Classification of worker failures: from Ray's exceptions to typed causes, and from causes to the reported reason."""

import re
from collections.abc import Sequence

import ray.exceptions
import ray.train

from training.events import FailureCause, FailureKind
from training.loop.memory_errors import out_of_memory_line, out_of_memory_message
from training.loop.ray_internals import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from training.planning.memory import Saving
from utils.errors import first_line, last_line

_GUESSES = " Some common causes include:"  # Ray 2.60 appends three
_LOST_WORKER = (
    ray.exceptions.RayActorError,  # ActorDiedError and ActorUnavailableError are subclasses
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.OwnerDiedError,
    WorkerHealthCheckFailedError,  # its message ends with the failure that it wraps
    WorkerGroupStartupFailedError,
)

# Ray 2.60.0: after the memory monitor kills an actor, only the message of the ActorDiedError names the cause.
_KILLED_FOR_MEMORY = re.compile(r"^.*running low on memory.*$", re.MULTILINE)

# The errors of collectives in the workers that remain, which may arrive before Ray has noticed the lost one.
_LOST_PEER = re.compile(
    r"(gloo).*Connection (?:closed|reset) by peer|(NCCL).*remote process exited|(nccl)RemoteError"
)


def classify_failures(error: BaseException) -> tuple[FailureCause, ...]:
    """Classify the exceptions of a failed attempt.

    Args:
        error: The exception raised by TorchTrainer.fit(), Ray's controller or a Ray call.

    Returns:
        One cause per failed worker, or a single one if Ray itself failed.
    """
    failures = error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else [error]
    return tuple(_cause_of(failure) for failure in failures)


def describe_failure(causes: Sequence[FailureCause], savings: Sequence[Saving]) -> str:
    """Describe in one line why workers failed.

    A failed worker makes the others fail as well, so the most specific cause is reported: out of memory, then a lost
    worker, then the first worker's own error.

    Args:
        causes: At least one cause.
        savings: Settings that would save memory, appended to an out-of-memory reason.
    """
    by_kind: dict[FailureKind, str] = {}
    for cause in causes:
        by_kind.setdefault(cause.kind, cause.line)
    if line := by_kind.get("out of memory"):
        return out_of_memory_message(line, savings)
    if line := by_kind.get("worker lost"):
        return f"worker lost: {line}"
    return by_kind["error"]


def describe_lost_cluster(error: Exception, savings: Sequence[Saving]) -> str:
    """Describe in one sentence why the driver lost its cluster; short of memory, Ray may kill a run's own actors."""
    causes = classify_failures(error)
    if causes[0].kind == "out of memory":
        return describe_failure(causes, savings)
    return f"the cluster was lost ({first_line(error)})."


def _cause_of(failure: BaseException) -> FailureCause:
    error = _unwrapped(failure)
    if line := out_of_memory_line(error):
        return FailureCause("out of memory", line)
    if peer := _LOST_PEER.search(str(error)):
        return FailureCause(
            "worker lost",
            f"another worker or its node exited, which closed a connection of {peer[peer.lastindex or 0]}",
        )
    if isinstance(error, _LOST_WORKER):
        text = str(error).strip()
        if killed := _KILLED_FOR_MEMORY.search(text):
            return FailureCause("out of memory", killed[0].strip())
        line = last_line(error).split(_GUESSES)[0]  # after the actor's ids
        if isinstance(error, ray.exceptions.ActorUnavailableError):  # names neither
            line = f"a worker or its node no longer answers ({line.rstrip('.')})"
        return FailureCause("worker lost", line)
    if isinstance(
        failure, ray.exceptions.RayTaskError
    ):  # from an evaluation, which has no worker log that shows the type
        return FailureCause("error", f"{type(error).__name__}: {first_line(error)}")
    return FailureCause("error", first_line(error))


def _unwrapped(error: BaseException) -> BaseException:
    """Return the exception inside Ray's wrappers."""
    while True:
        match error:
            case ray.train.ControllerError():
                error = error.controller_failure
            case ray.exceptions.RayTaskError() if isinstance(error.cause, BaseException):
                error = error.cause
            case _:
                return error
