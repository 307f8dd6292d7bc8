"""Events that workers emit to the driver during a run, and the actor that delivers them."""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from runs.layout import Speed
from utils.errors import AnnealError


@dataclass(frozen=True)
class Phase:
    """The phase that rank 0 is in."""

    text: str
    fraction: float | None = None
    """Completed fraction from 0 to 1, if known."""


@dataclass(frozen=True)
class WorkersWaiting:
    """No worker group is running; Ray waits for resources to start one."""


@dataclass(frozen=True)
class WorkersStarted:
    """A worker group has its resources and is starting."""

    workers: int


@dataclass(frozen=True)
class ModelReady:
    """A built model, before the first step."""

    parameters: int
    trainable_parameters: int


@dataclass(frozen=True)
class StepDone:
    """A completed optimizer step."""

    step: int
    max_steps: int
    epoch: float
    loss: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int
    figures: dict[str, float]
    """Task-specific metrics in addition to the loss."""


@dataclass(frozen=True)
class Evaluated:
    """A completed evaluation."""

    step: int
    epoch: float
    eval_loss: float
    figures: dict[str, float]
    """Task-specific metrics in addition to the loss."""


@dataclass(frozen=True)
class CheckpointCommitted:
    """A committed checkpoint: its manifest is in the bucket."""

    step: int
    uri: str
    tokens: int
    """Tokens trained on so far, without padding."""
    trained_tokens: int
    """Loss tokens trained on so far."""
    speed: Speed


@dataclass(frozen=True)
class Restored:
    """The checkpoint of this run that the attempt resumes from; its `speed` is empty."""

    checkpoint: CheckpointCommitted


FailureKind = Literal["out of memory", "worker lost", "error"]


@dataclass(frozen=True)
class FailureCause:
    """The reason why one worker failed, as classified by `training.launch.failures.classify_failures`."""

    kind: FailureKind
    line: str
    """The line of the exception's message that states the cause."""


@dataclass(frozen=True)
class WorkersFailed:
    """Workers failed, and Ray restarts the worker group."""

    causes: tuple[FailureCause, ...]
    """One cause per failed worker, in rank order."""


@dataclass(frozen=True)
class Rejected:
    """An error that only the user can fix; restarting the workers would not help."""

    message: str


@dataclass(frozen=True)
class Notice:
    """A message for the user; the run continues."""

    text: str


Event = (
    Phase
    | WorkersWaiting
    | WorkersStarted
    | ModelReady
    | StepDone
    | Evaluated
    | CheckpointCommitted
    | Restored
    | WorkersFailed
    | Rejected
    | Notice
)


Request = Literal["stop", "regroup"]
"""A request that workers check for after each step."""


class UnrecordedError(AnnealError):
    """The error raised when a run ended and its result.json cannot be written; the message states both causes."""

    exit_code = 1


class WorkersFailedError(AnnealError):
    """The error raised when workers of an evaluation failed; the message states the cause."""

    exit_code = 1


class DivergedError(AnnealError):
    """A NaN or infinite loss or gradient norm; the message lists the step, the rows and the last good checkpoint."""


class EventMailbox:
    """A Ray actor that connects rank 0, Ray's controller and the driver. Calls block until there is an answer, so no caller polls."""

    def __init__(self):
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._requested: Request | None = None
        self._is_requested = asyncio.Event()
        self._paused = False
        self._rejected = False
        self._failures: dict[int, str] = {}
        self._closed = False
        self._controller: Any = None
        self._is_controlled = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Queue an event for the driver; rank 0 and the controller call this without waiting."""
        self._events.append(event)
        if isinstance(event, CheckpointCommitted):
            self._failures.clear()
        self._news.set()

    async def take(self) -> list[Event] | None:
        """Wait for events and return them, or None once the mailbox is closed; the driver calls this."""
        await self._news.wait()
        events, self._events = self._events, []
        if self._closed:
            return events or None
        self._news.clear()
        return events

    async def close(self) -> None:
        """Close the mailbox after all workers have exited; the driver calls this."""
        self._closed = True
        self._news.set()
        self._is_controlled.set()

    async def controlled_by(self, controller: Any) -> None:
        """Register Ray's controller; the controller calls this when it starts."""
        self._controller = controller
        self._is_controlled.set()

    async def controller(self) -> Any:
        """Wait for Ray's controller and return it, or None if the mailbox closes before one starts."""
        await self._is_controlled.wait()
        return self._controller

    async def reject(self, message: str) -> None:
        """Report an error that a restart cannot fix; calls after the first have no effect."""
        if not self._rejected:
            self._rejected = True
            await self.put(Rejected(message))

    async def is_rejected(self) -> bool:
        """Return whether a worker has rejected the run."""
        return self._rejected

    async def fails_again(self, rank: int, error: str) -> bool:
        """Record a rank's error; return whether it equals the rank's previous error with no checkpoint committed in between."""
        again = self._failures.get(rank) == error
        self._failures[rank] = error
        return again

    async def request_stop(self) -> None:
        """Ask the workers to commit a checkpoint and exit; the driver calls this after a signal."""
        self._requested = "stop"
        self._is_requested.set()

    async def request_regroup(self) -> None:
        """Ask the workers to commit a checkpoint and pause; Ray's controller calls this before it starts a larger group."""
        if self._requested is None:
            self._requested = "regroup"
            self._is_requested.set()

    async def wait_for_request(self) -> Request | None:
        """Wait for a request to the workers and return it."""
        await self._is_requested.wait()
        return self._requested

    async def pause(self) -> None:
        """Mark the workers as paused after their commit, ready to be terminated; rank 0 calls this."""
        self._paused = True

    async def is_paused(self) -> bool:
        """Return whether the workers are paused and ready to be terminated."""
        return self._paused

    async def clear_regroup(self) -> None:
        """Clear a regroup request; Ray's controller calls this before it starts a group."""
        self._paused = False
        if self._requested == "regroup":
            self._requested = None
            self._is_requested.clear()
